"""Whether a variant differs from what it is compared with by more than chance: pairs of the same seed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Quantiles of Student's t for 1, 2, .. degrees of freedom; with more, the last is a little wide."""


class Interval(NamedTuple):
    """A mean over seeds, and where it lies with 95 % confidence; no bounds from a single seed."""

    mean: float
    low: float | None
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {name: None if value is None else round(value, 4) for name, value in self._asdict().items()}


def interval(values: Sequence[float]) -> Interval:
    """Student's interval for the mean.

    Args:
        values: One for each seed, at least one.
    """
    mean, n = fmean(values), len(values)
    if n == 1:
        return Interval(mean, None, None)
    half = _T_975[min(n - 1, len(_T_975)) - 1] * stdev(values) / n**0.5
    return Interval(mean, mean - half, mean + half)


def paired(values: Sequence[float], others: Sequence[float]) -> Interval:
    """The interval for the difference, seed by seed.

    Args:
        values: One for each seed.
        others: Of the same seeds, in the same order.
    """
    return interval([a - b for a, b in zip(values, others, strict=True)])
