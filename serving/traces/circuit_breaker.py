"""When to stop trying: a breaker that opens after failures in a row and keeps probing, so that it never stays open."""

from __future__ import annotations

from typing import Literal

State = Literal["closed", "open", "half_open"]


class Breaker:
    """Half-open breaker over a clock that the caller reads.

    Closed, everything is tried. Open, one try is let through every ``probe_s`` seconds. Any success closes it.
    """

    def __init__(self, after: int, probe_s: float) -> None:
        self._after = after
        self._probe_s = probe_s
        self._failures = 0
        self._next_probe = 0.0
        self.state: State = "closed"

    def admits(self, now: float) -> bool:
        """Whether a try may be made; a probe that is let through is counted as made."""
        if self.state == "closed":
            return True
        if now < self._next_probe:
            return False
        self.state = "half_open"
        self._next_probe = now + self._probe_s
        return True

    def succeeded(self) -> None:
        """A try went well."""
        self.state = "closed"
        self._failures = 0

    def failed(self, now: float) -> None:
        """A try failed."""
        self._failures += 1
        if self.state == "half_open" or (self.state == "closed" and self._failures >= self._after):
            self.state = "open"
            self._next_probe = now + self._probe_s
