"""When a node takes over a newer version: lazy synchronisation (arXiv 2602.06932 sweeps the interval in its figure 5).

Every takeover costs a little serving: the pause of the swap, and what fetching and checking take from the verify
steps. Every
delay costs what the newer version would have brought. With T seconds between takeovers of c seconds each, and versions
that get better by g a second, as a share of the output, c / T + g T / 2 of the output is lost. That is least at
T = sqrt(2 c / g); Young (1974) has the same balance for checkpoints and lost work. ``auto`` measures c and g of its own
takeovers and moves towards that interval, by a factor of two at most at each of them. A takeover that brought nothing
measurable widens it.

What is not delayed: steps back, canaries and their ends, pins, and the first version after the start.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from schemas.hash_sampling import fixed_chance
from schemas.settings import Update

WINDOW_S = 60.0
"""Before and after a takeover the output of so long a time is compared."""
MIN_VERIFY_STEPS = 50
"""Verify steps that either side of a comparison needs."""
_NARROWEST_S = 1.0
"""What ``auto`` widens from, and the steps below which it follows at once."""
_WEIGHT = 0.5
"""Of the newest takeover in the running means."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The engine's counters at one moment."""

    time_s: float
    verify_steps: int
    accepted: int
    output_tokens: int

    def tokens_per_s(self, later: Reading) -> float:
        """Output up to a later reading."""
        return (later.output_tokens - self.output_tokens) / max(later.time_s - self.time_s, 1e-9)


class _Level(NamedTuple):
    """The output of a time in which one version served."""

    tokens_per_verify_step: float
    tokens_per_s: float


def best_interval(cost_s: float, gain_per_s: float) -> float:
    """Seconds between takeovers at which the least output is lost; infinite where nothing is gained."""
    return math.sqrt(2 * cost_s / gain_per_s) if gain_per_s > 0 else math.inf


def lost_s(before: float, begun: Reading, brought: Reading) -> float:
    """Serving time that fetching a version took from the verify steps, by the output of then and ``before``, in
    tokens/s.
    """
    if before <= 0:
        return 0.0
    share = 1 - begun.tokens_per_s(brought) / before
    return max(share, 0.0) * (brought.time_s - begun.time_s)


class SyncPolicy:
    """Says when a newer version is due, and learns from those that were taken over. Times are of one clock."""

    def __init__(self, settings: Update, node: str) -> None:
        self._settings, self._node = settings, node
        self._measures = settings.min_interval == "auto"
        self.interval_s: float = 0.0 if settings.min_interval == "auto" else settings.min_interval
        """The least time between two takeovers of the moment."""
        self._last: float | None = None
        self._cost_s: float | None = None
        self._gain_per_s: float | None = None
        self._readings: deque[Reading] = deque()
        self._served: _Level | None = None
        self._before: float | None = None
        self._since_last_s = 0.0

    def due_at(self, version: str, behind_since: float) -> float:
        """When a newer version is to be taken over by a node that has been behind for so long."""
        earliest = behind_since if self._last is None else max(behind_since, self._last + self.interval_s)
        spread = self._settings.jitter * self.interval_s * fixed_chance(f"{self._node}/{version}")
        return min(earliest + spread, behind_since + self._settings.max_staleness)

    def read(self, reading: Reading) -> None:
        """Take the counters of the moment."""
        if not self._measures:
            return
        self._readings.append(reading)
        while len(self._readings) > 2 and self._readings[1].time_s <= reading.time_s - WINDOW_S:
            self._readings.popleft()
        if self._before is not None and reading.time_s - self._readings[0].time_s >= WINDOW_S:
            self._compare()

    def swapped(self) -> None:
        """Another version serves from now on: what was read is of the one before."""
        self._compare()
        self._served = _level(self._readings)
        self._readings.clear()

    def taken(self, begun: Reading, brought: Reading, pause_s: float) -> None:
        """A newer version was taken over: when that was begun, when it had been fetched, and the pause of the swap."""
        self._since_last_s = 0.0 if self._last is None else brought.time_s - self._last
        self._last = brought.time_s
        served, self._served = self._served, None
        if served is not None:
            self._cost_s = _mean(self._cost_s, pause_s + lost_s(served.tokens_per_s, begun, brought))
            self._before = served.tokens_per_verify_step if self._since_last_s > 0 else None

    def _compare(self) -> None:
        """Learn what the last takeover brought, if enough is known of both sides."""
        before, after = self._before, _level(self._readings)
        self._before = None
        if before is None or after is None or self._cost_s is None:
            return
        self._gain_per_s = _mean(self._gain_per_s, (after.tokens_per_verify_step / before - 1) / self._since_last_s)
        best = best_interval(self._cost_s, self._gain_per_s)
        narrowest, widest = self.interval_s / 2, 2 * max(self.interval_s, _NARROWEST_S)
        interval = min(max(best, narrowest), widest, self._settings.max_staleness)
        self.interval_s = interval if interval >= _NARROWEST_S else 0.0


def _level(readings: Sequence[Reading]) -> _Level | None:
    """What was read of one version; None where it drafted too few verify steps."""
    verify_steps = readings[-1].verify_steps - readings[0].verify_steps if readings else 0
    if verify_steps < MIN_VERIFY_STEPS:
        return None
    first, last = readings[0], readings[-1]
    return _Level(1 + (last.accepted - first.accepted) / verify_steps, first.tokens_per_s(last))


def _mean(mean: float | None, newest: float) -> float:
    return newest if mean is None else mean + _WEIGHT * (newest - mean)
