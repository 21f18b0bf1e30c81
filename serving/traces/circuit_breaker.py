"""Circuit breaker: opens after failures in a row, and probes at intervals, so that it never stays open for good."""

from __future__ import annotations

from typing import Literal

CircuitState = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """Half-open circuit breaker on the caller's clock.

    Closed, it allows every attempt. Open, it allows one attempt every ``probe_s`` seconds. Any success closes it.
    """

    def __init__(self, max_failures: int, probe_s: float) -> None:
        self._max_failures = max_failures
        self._probe_s = probe_s
        self._failures = 0
        self._next_probe = 0.0
        self.state: CircuitState = "closed"

    def allows(self, now: float) -> bool:
        """Return whether an attempt may be made; an allowed probe counts as made."""
        if self.state == "closed":
            return True
        if now < self._next_probe:
            return False
        self.state = "half_open"
        self._next_probe = now + self._probe_s
        return True

    def record_success(self) -> None:
        """Close the circuit."""
        self.state = "closed"
        self._failures = 0

    def record_failure(self, now: float) -> None:
        """Count a failure; open the circuit after ``max_failures`` in a row, or after a failed probe."""
        self._failures += 1
        if self.state == "half_open" or (self.state == "closed" and self._failures >= self._max_failures):
            self.state = "open"
            self._next_probe = now + self._probe_s
