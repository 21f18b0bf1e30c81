"""Update policy: when a node updates to a newer version (lazy synchronization; arXiv 2602.06932, figure 5, sweeps it).

Every update costs a little serving time: the pause of the swap, and the time that download and check take from the
verify steps. Every delay costs the gain of the newer version. With T seconds between updates of c seconds each, and
versions that improve by g per second as a share of the output, the lost share of the output is c / T + g T / 2. It is
least at T = sqrt(2 c / g); Young (1974) has the same balance for checkpoints and lost work. ``auto`` measures c and g
of the node's own updates, and moves towards that interval by a factor of two at most with each update. An update
without a measurable gain widens the interval.

Never delayed: rollbacks, canaries and their ends, pins, and the first version after the start.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from schemas.hash_sampling import hash_ratio
from schemas.settings import Update

WINDOW_S = 60.0
"""Length of the windows before and after an update whose output is compared."""
MIN_VERIFY_STEPS = 50
"""Verify steps that either window of a comparison needs."""
_NARROWEST_S = 1.0
"""``auto`` widens from this interval; below it, the node updates at once."""
_WEIGHT = 0.5
"""Weight of the newest update in the running means."""


@dataclass(frozen=True, slots=True)
class CounterReading:
    """The engine's counters at one time."""

    time_s: float
    verify_steps: int
    accepted: int
    output_tokens: int

    def tokens_per_s(self, later: CounterReading) -> float:
        """Return the output rate from this reading to a later one."""
        return (later.output_tokens - self.output_tokens) / max(later.time_s - self.time_s, 1e-9)


class _ServedRate(NamedTuple):
    """Output rates over a window in which one version served."""

    acceptance_length: float
    tokens_per_s: float


def best_interval(cost_s: float, gain_per_s: float) -> float:
    """Return the seconds between updates that lose the least output; infinite without a gain."""
    return math.sqrt(2 * cost_s / gain_per_s) if gain_per_s > 0 else math.inf


def fetch_cost_s(before: float, started: CounterReading, fetched: CounterReading) -> float:
    """Return the serving time that a download took: the drop of the output rate against ``before``, in tokens/s."""
    if before <= 0:
        return 0.0
    share = 1 - started.tokens_per_s(fetched) / before
    return max(share, 0.0) * (fetched.time_s - started.time_s)


class UpdatePolicy:
    """Decides when a newer version is due, and learns from the updates made. All times are of one clock."""

    def __init__(self, settings: Update, node: str) -> None:
        self._settings, self._node = settings, node
        self._is_auto = settings.min_interval == "auto"
        self.interval_s: float = 0.0 if settings.min_interval == "auto" else settings.min_interval
        """Current minimum time between two updates."""
        self._last_update_s: float | None = None
        self._cost_s: float | None = None
        self._gain_per_s: float | None = None
        self._readings: deque[CounterReading] = deque()
        self._served: _ServedRate | None = None
        self._length_before: float | None = None
        self._since_last_s = 0.0

    def due_at(self, version: str, behind_since: float) -> float:
        """Return when to update to a newer version, for a node that has been behind since ``behind_since``."""
        last = self._last_update_s
        earliest = behind_since if last is None else max(behind_since, last + self.interval_s)
        spread = self._settings.jitter * self.interval_s * hash_ratio(f"{self._node}/{version}")
        return min(earliest + spread, behind_since + self._settings.max_staleness)

    def record_reading(self, reading: CounterReading) -> None:
        """Take the current counters."""
        if not self._is_auto:
            return
        self._readings.append(reading)
        while len(self._readings) > 2 and self._readings[1].time_s <= reading.time_s - WINDOW_S:
            self._readings.popleft()
        if self._length_before is not None and reading.time_s - self._readings[0].time_s >= WINDOW_S:
            self._compare()

    def record_swap(self) -> None:
        """Start a new window: the readings so far belong to the version before."""
        self._compare()
        self._served = _served_rate(self._readings)
        self._readings.clear()

    def record_update(self, started: CounterReading, fetched: CounterReading, pause_s: float) -> None:
        """Take an update to a newer version: counters at its start and after the download, and the swap's pause."""
        self._since_last_s = 0.0 if self._last_update_s is None else fetched.time_s - self._last_update_s
        self._last_update_s = fetched.time_s
        served, self._served = self._served, None
        if served is not None:
            self._cost_s = _running_mean(self._cost_s, pause_s + fetch_cost_s(served.tokens_per_s, started, fetched))
            self._length_before = served.acceptance_length if self._since_last_s > 0 else None

    def _compare(self) -> None:
        """Learn the gain of the last update, if both windows have enough verify steps."""
        before, after = self._length_before, _served_rate(self._readings)
        self._length_before = None
        if before is None or after is None or self._cost_s is None:
            return
        self._gain_per_s = _running_mean(self._gain_per_s, (after.acceptance_length / before - 1) / self._since_last_s)
        best = best_interval(self._cost_s, self._gain_per_s)
        narrowest, widest = self.interval_s / 2, 2 * max(self.interval_s, _NARROWEST_S)
        interval = min(max(best, narrowest), widest, self._settings.max_staleness)
        self.interval_s = interval if interval >= _NARROWEST_S else 0.0


def _served_rate(readings: Sequence[CounterReading]) -> _ServedRate | None:
    """Return the rates over the readings of one version; None if it drafted in too few verify steps."""
    steps = readings[-1].verify_steps - readings[0].verify_steps if readings else 0
    if steps < MIN_VERIFY_STEPS:
        return None
    first, last = readings[0], readings[-1]
    return _ServedRate(1 + (last.accepted - first.accepted) / steps, first.tokens_per_s(last))


def _running_mean(mean: float | None, newest: float) -> float:
    return newest if mean is None else mean + _WEIGHT * (newest - mean)
