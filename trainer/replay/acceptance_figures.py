"""What verify steps of many requests come to, with the uncertainty that comes from which requests happened to be
there. Pure.

Intervals are bootstrapped over requests (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3):
tokens of one request depend on each other, requests do not. Every version is drawn with the same resamples, so that
the difference between two versions is a paired one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trainer.replay.verify_steps import F64, VerifySteps

RESAMPLES = 1000
SEED = 0
COVERED = 0.95


class Interval(NamedTuple):
    """A figure, and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return not self.low <= 0 <= self.high

    def summary(self) -> dict[str, float]:
        """As JSON."""
        return {name: round(value, 4) for name, value in self._asdict().items()}


class Figures(NamedTuple):
    """Of one version over a group of requests."""

    requests: int
    verify_steps: float
    accepted: float
    accepted_per_step: Interval
    by_depth: tuple[float, ...]
    """Of the verify steps whose draft could be kept so deep, the share in which it was."""
    everywhere: float
    """Accepted tokens per step over all positions, wherever verify steps begin:
    ``trainer.objective.simulated_acceptance``.
    """

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "requests": self.requests,
            "verify_steps": round(self.verify_steps, 3),
            "accepted": round(self.accepted, 3),
            "accepted_per_step": self.accepted_per_step.summary(),
            "acceptance_by_depth": [round(share, 4) for share in self.by_depth],
            "accepted_per_step_everywhere": round(self.everywhere, 4),
        }


def of(verify_steps: Sequence[VerifySteps]) -> Figures:
    """The figures of a group.

    Args:
        verify steps: One for each request, at least one.
    """
    tried, kept = np.sum([r.tried_K for r in verify_steps], axis=0), np.sum([r.kept_K for r in verify_steps], axis=0)
    counts_R2 = _counts(verify_steps)
    return Figures(
        requests=len(verify_steps),
        verify_steps=float(counts_R2[:, 1].sum()),
        accepted=float(counts_R2[:, 0].sum()),
        accepted_per_step=_interval(counts_R2.sum(axis=0)[None], _resampled(counts_R2)),
        by_depth=tuple((kept / np.maximum(tried, 1e-12)).tolist()),
        everywhere=sum(r.everywhere_accepted for r in verify_steps) / max(sum(r.everywhere for r in verify_steps), 1),
    )


def difference(verify_steps: Sequence[VerifySteps], others: Sequence[VerifySteps]) -> Interval:
    """By how much the accepted tokens per step is above that of other verify steps of the same requests, in the same
    order.
    """
    return paired(_counts(verify_steps), _counts(others))


def paired(own_R2: F64, other_R2: F64) -> Interval:
    """The difference of two accepted tokens per step over the same parts of traffic, drawn together.

    Args:
        own_R2: Kept tokens, and what they were kept in (verify steps or positions), of each part.
        other_R2: The same of the other.
    """
    value = _lengths(own_R2.sum(axis=0)[None]) - _lengths(other_R2.sum(axis=0)[None])
    spread = _lengths(_resampled(own_R2)) - _lengths(_resampled(other_R2))
    return Interval(float(value[0]), *_bounds(spread))


def _counts(verify_steps: Sequence[VerifySteps]) -> F64:
    return np.array([(r.accepted, r.verify_steps) for r in verify_steps])


def _resampled(counts_R2: F64) -> F64:
    """[resamples, 2] sums over as many requests, drawn with replacement; the same ones for every version."""
    generator, requests = np.random.default_rng(SEED), len(counts_R2)
    return np.array([counts_R2[generator.integers(requests, size=requests)].sum(axis=0) for _ in range(RESAMPLES)])


def _interval(total_12: F64, resampled: F64) -> Interval:
    return Interval(float(_lengths(total_12)[0]), *_bounds(_lengths(resampled)))


def _lengths(sums: F64) -> F64:
    lengths: F64 = sums[:, 0] / np.maximum(sums[:, 1], 1e-12)
    return lengths


def _bounds(values: F64) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(low), float(high)
