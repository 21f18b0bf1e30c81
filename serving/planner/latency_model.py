"""How long the target's forward and the speculator's draft steps take on this machine.

A *row* is one token of a forward. Latency is measured in units of this machine's pace, so that the curves keep their
form while other processes slow the machine down as a whole. No I/O and no torch.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

_KNOT_RATE = 0.02
_PACE_RATE = 0.2
_MAX_RATIO = 3.0
"""A measured latency counts at most as this multiple of the expected one: outliers say little."""


class ForwardTiming(NamedTuple):
    """Duration of one forward that read no prompt."""

    sequences: int
    rows: int
    seconds: float


class LatencyCurve:
    """Seconds by number of rows: linear between knots, which move towards the measurements."""

    def __init__(self, knots: Mapping[int, float]) -> None:
        self._rows = sorted(knots)
        self._seconds = [knots[rows] for rows in self._rows]

    def predict(self, rows: int) -> float:
        """Return the expected seconds."""
        low, share = self._locate(rows)
        return self._seconds[low] * (1 - share) + self._seconds[min(low + 1, len(self._rows) - 1)] * share

    def predict_range(self, first: int, count: int) -> F64:
        """Return [count] the expected seconds of ``first``, ``first`` + 1, .. rows."""
        rows = np.arange(first, first + count)
        seconds: F64 = np.interp(rows, self._rows, self._seconds)
        outside = (rows < self._rows[0]) | (rows > self._rows[-1])
        seconds[outside] = [self.predict(int(row)) for row in rows[outside]]
        return seconds

    def update(self, rows: int, error: float) -> None:
        """Move the knots next to ``rows`` by a share of ``error`` each."""
        low, share = self._locate(rows)
        share = min(max(share, 0.0), 1.0)
        for knot, weight in ((low, 1 - share), (low + 1, share)):
            if knot < len(self._seconds):
                self._seconds[knot] = max(self._seconds[knot] + weight * error, 1e-9)

    def _locate(self, rows: int) -> tuple[int, float]:
        """Return the knot at or below ``rows`` and the share of the way to the next; extrapolate beyond the ends."""
        if len(self._rows) == 1:
            return 0, 0.0
        low = min(max(bisect.bisect_right(self._rows, rows) - 1, 0), len(self._rows) - 2)
        return low, (rows - self._rows[low]) / (self._rows[low + 1] - self._rows[low])


class LatencyModel:
    """Latency of the target's forward and of the speculator's draft steps on this machine.

    Args:
        rows: Seconds of a forward over rows of one sequence.
        sequences: Seconds that a forward over as many sequences takes longer than over one with the same rows.
        first_step: Seconds of the first draft step by number of sequences.
        further_step: Seconds of each later draft step.
        catch_up_row: Seconds that the first draft step takes longer for each further token that it reads.
    """

    def __init__(
        self,
        rows: LatencyCurve,
        sequences: LatencyCurve,
        first_step: LatencyCurve,
        further_step: LatencyCurve,
        catch_up_row: float = 0.0,
    ) -> None:
        self._rows, self._sequences, self._first_step, self._further_step = rows, sequences, first_step, further_step
        self.catch_up_row = catch_up_row
        self.pace = 1.0
        """Measured seconds per predicted second. If other processes slow the machine down as a whole, it follows
        quickly, and the curves keep their form."""

    def predict_verify(self, sequences: int, rows: int) -> float:
        """Return the seconds of the target's forward, at pace 1."""
        return self._rows.predict(rows) + self._sequences.predict(sequences)

    def predict_rows(self, sequences: int, count: int) -> F64:
        """Return [count] the seconds of the target's forward over one row per sequence and 0, 1, .. more, at pace 1."""
        return self._rows.predict_range(sequences, count) + self._sequences.predict(sequences)

    def predict_draft(self, sequences: int, depth: int) -> float:
        """Return the seconds to draft ``depth`` tokens, one after the other, for each sequence, at pace 1."""
        if not depth or not sequences:
            return 0.0
        return self.predict_step(sequences, 0) + (depth - 1) * self.predict_step(sequences, 1)

    def predict_step(self, sequences: int, step: int) -> float:
        """Return the seconds of one draft step, numbered from 0, at pace 1."""
        return (self._further_step if step else self._first_step).predict(sequences)

    def update_verify(self, timing: ForwardTiming) -> None:
        """Learn from the target's forward."""
        expected = self.predict_verify(timing.sequences, timing.rows)
        ratio = self._compare(timing.seconds, expected)
        error = _KNOT_RATE * expected * (ratio - 1)
        self._rows.update(timing.rows, error)
        self._sequences.update(timing.sequences, error if timing.sequences > 1 else 0.0)
        self.pace *= 1 + _PACE_RATE * (ratio - 1)

    def update_draft(self, steps: Sequence[ForwardTiming]) -> None:
        """Learn from the draft steps in order."""
        for i, timing in enumerate(steps):
            curve = self._further_step if i else self._first_step
            expected = curve.predict(timing.sequences)
            curve.update(timing.sequences, _KNOT_RATE * expected * (self._compare(timing.seconds, expected) - 1))

    def _compare(self, seconds: float, expected: float) -> float:
        return min(seconds / (self.pace * expected), _MAX_RATIO)
