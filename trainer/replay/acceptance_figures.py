"""Acceptance figures over many requests, with confidence intervals. Pure.

Intervals are bootstrapped over requests (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3):
tokens of one request depend on each other, requests do not. All versions use the same resamples, so the difference of
two versions is a paired one.

Shapes: R requests (or other parts of traffic), 2 = accepted tokens and verify steps (or positions), K draft depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trainer.objective.simulated_acceptance import F64
from trainer.replay.verify_steps import ExpectedSteps

RESAMPLES = 1000
SEED = 0
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return not self.low <= 0 <= self.high

    def plus(self, constant: float) -> Interval:
        """Return the interval, shifted by a constant."""
        return Interval(*(bound + constant for bound in self))

    def summary(self) -> dict[str, float]:
        """Return the interval as JSON."""
        return {name: round(value, 4) for name, value in self._asdict().items()}


class AcceptanceFigures(NamedTuple):
    """Figures of one version over a group of requests."""

    requests: int
    verify_steps: float
    accepted: float
    accepted_per_step: Interval
    """Accepted tokens per verify step, bonus token excluded."""
    by_depth: tuple[float, ...]
    """Fraction of the verify steps that accepted a token of each depth, among those that could."""
    all_positions: float
    """Accepted tokens per position over all positions; for greedy requests, as in learning curves."""

    @property
    def acceptance_length(self) -> Interval:
        """Tokens per verify step, bonus token included."""
        return self.accepted_per_step.plus(1)

    def summary(self) -> dict[str, Any]:
        """Return the figures as JSON."""
        return {
            "requests": self.requests,
            "verify_steps": round(self.verify_steps, 3),
            "accepted": round(self.accepted, 3),
            "acceptance_length": self.acceptance_length.summary(),
            "acceptance_by_depth": [round(rate, 4) for rate in self.by_depth],
            "acceptance_length_all_positions": round(1 + self.all_positions, 4),
        }


def compute_figures(steps: Sequence[ExpectedSteps]) -> AcceptanceFigures:
    """Return the figures of a group.

    Args:
        steps: One entry per request, at least one.
    """
    possible, accepted = np.sum([s.possible_K for s in steps], axis=0), np.sum([s.accepted_K for s in steps], axis=0)
    counts_R2 = _counts(steps)
    return AcceptanceFigures(
        requests=len(steps),
        verify_steps=float(counts_R2[:, 1].sum()),
        accepted=float(counts_R2[:, 0].sum()),
        accepted_per_step=_interval(counts_R2.sum(axis=0)[None], _resample(counts_R2)),
        by_depth=tuple((accepted / np.maximum(possible, 1e-12)).tolist()),
        all_positions=sum(s.all_positions_accepted for s in steps) / max(sum(s.all_positions for s in steps), 1),
    )


def compare_steps(steps: Sequence[ExpectedSteps], others: Sequence[ExpectedSteps]) -> Interval:
    """Return the difference in accepted tokens per step to other steps of the same requests, in the same order."""
    return paired_difference(_counts(steps), _counts(others))


def paired_difference(own_R2: F64, other_R2: F64) -> Interval:
    """Return the difference of two acceptances over the same parts of traffic, resampled together.

    Args:
        own_R2: Accepted tokens and verify steps (or positions) of each part.
        other_R2: The same of the other.
    """
    value = _ratios(own_R2.sum(axis=0)[None]) - _ratios(other_R2.sum(axis=0)[None])
    spread = _ratios(_resample(own_R2)) - _ratios(_resample(other_R2))
    return Interval(float(value[0]), *_bounds(spread))


def _counts(steps: Sequence[ExpectedSteps]) -> F64:
    return np.array([(s.accepted, s.verify_steps) for s in steps])


def _resample(counts_R2: F64) -> F64:
    """Return [resamples, 2]: sums over as many requests, drawn with replacement; the same draws for every version."""
    generator, requests = np.random.default_rng(SEED), len(counts_R2)
    return np.array([counts_R2[generator.integers(requests, size=requests)].sum(axis=0) for _ in range(RESAMPLES)])


def _interval(total_12: F64, resampled: F64) -> Interval:
    return Interval(float(_ratios(total_12)[0]), *_bounds(_ratios(resampled)))


def _ratios(sums: F64) -> F64:
    ratios: F64 = sums[:, 0] / np.maximum(sums[:, 1], 1e-12)
    return ratios


def _bounds(values: F64) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
