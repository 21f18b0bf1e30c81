"""What recording costs of SGLang's time, and how much of the traffic may be recorded for that."""

from __future__ import annotations

import threading

WINDOW_S = 2.0
"""Steps of about this long are looked at together."""
PAUSE_S = 1.0
"""A longer time between two steps is one in which the server had nothing to do."""
LEAST = 1 / 256
"""Never less than this share of the requests: what nothing is measured of stays too expensive for ever."""


def adjusted(share: float, cost_s: float, busy_s: float, limit: float) -> float:
    """Share of the requests to record from now on.

    Args:
        share: Until now.
        cost_s: What recording took.
        busy_s: Time of the steps that it was taken from.
        limit: Share of the steps' time that it may take.
    """
    spent = cost_s / busy_s
    if spent > limit:
        return max(LEAST, share * limit / spent)
    # Half of the limit is left free, so that the share does not swing.
    return min(1.0, share * 1.25) if spent < limit / 2 else share


class CostGate:
    """Watches the cost, for any thread.

    Args:
        limit: Share of the steps' time.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._cost = self._busy = 0.0
        self._last: float | None = None
        self.share = 1.0
        """Of the requests, to be recorded now."""
        self.spent = 0.0
        """Share of the steps' time that recording took in the last window."""

    def pay(self, seconds: float) -> None:
        """Recording took time from the server: its thread's, or the interpreter's."""
        with self._lock:
            self._cost += seconds

    def step(self, now: float) -> None:
        """A step begins, at a time in monotonic seconds."""
        with self._lock:
            if self._last is not None and now - self._last < PAUSE_S:
                self._busy += now - self._last
            self._last = now
            if self._busy >= WINDOW_S:
                self.share = adjusted(self.share, self._cost, self._busy, self._limit)
                self.spent = self._cost / self._busy
                self._cost = self._busy = 0.0
