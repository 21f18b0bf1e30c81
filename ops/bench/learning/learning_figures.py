"""The numbers that summarize trials: levels of the curve, changes of domain, and differences with their intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from trainer.replay.learning_curve import (
    CURVE_WINDOW,
    CurveValue,
    first_scores,
    last_scores,
    learning_curve,
    mean_accepted_per_step,
    tokens_to_level,
)
from trainer.replay.prequential import BatchScore

OVER_BY_DOMAIN = 16_000
"""Tokens that a value of the curve of one domain of a mixed stream covers, of which the domain is a fourth."""
AFTER_SHIFT = 2_000
"""Tokens after a shift that its drop and its recovery cover."""
RECOVERED = 0.9
"""Share of the level before a shift at which the draft counts as recovered."""
LEVELS = (0.5, 1.0, 1.5)
"""Accepted tokens per step."""

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Quantiles of Student's t for 1, 2, .. degrees of freedom; for more the last one is slightly too wide."""


@dataclass(frozen=True, slots=True)
class Shift:
    """The change from one domain to another. Levels are accepted tokens per step."""

    domain: str
    """The new domain."""
    before: float
    """Over the last ``CURVE_WINDOW`` tokens of the domain before."""
    after: float
    """Over the first ``AFTER_SHIFT`` tokens of the new domain."""
    recovered_after: int | None
    """Tokens of the new domain until its last ``AFTER_SHIFT`` tokens are at ``RECOVERED`` of the level before."""
    settled_after: int | None
    """The same, for the level of the last ``CURVE_WINDOW`` tokens of the new domain."""
    over_static: float
    """Tokens per verify step, bonus token included, over those of the frozen draft, over the new domain."""

    @property
    def drop(self) -> float:
        """The loss of accepted tokens per step."""
        return self.before - self.after

    def summary(self) -> dict[str, Any]:
        """Return the JSON form."""
        levels = {name: round(getattr(self, name), 4) for name in ("before", "after", "drop", "over_static")}
        reached = {"recovered_after": self.recovered_after, "settled_after": self.settled_after}
        return {"domain": self.domain, **levels, **reached}


def find_shifts(scores: Sequence[BatchScore]) -> list[Shift]:
    """Return every change of domain of an ordered stream."""
    by_domain = [(domain, list(group)) for domain, group in groupby(scores, key=lambda score: score.label)]
    shifts = []
    for (_, ended), (domain, started) in pairwise(by_domain):
        before, own = (mean_accepted_per_step(last_scores(each, CURVE_WINDOW)) for each in (ended, started))
        # The first values cover too few tokens: the curve counts from where it covers as many as all later ones.
        rolling = [value for value in learning_curve(started, AFTER_SHIFT) if value.tokens >= AFTER_SHIFT]
        shifts.append(
            Shift(
                domain,
                before,
                after=mean_accepted_per_step(first_scores(started, AFTER_SHIFT)),
                recovered_after=tokens_to_level(rolling, RECOVERED * before),
                settled_after=tokens_to_level(rolling, RECOVERED * own),
                over_static=ratio_to_static(started),
            )
        )
    return shifts


def ratio_to_static(scores: Iterable[BatchScore]) -> float:
    """Return the tokens per verify step over those of the frozen draft, where both are simulated."""
    both = [score for score in scores if score.static_accepted is not None]
    positions = sum(score.positions for score in both)
    static = sum(score.static_accepted or 0 for score in both)
    return (positions + sum(score.accepted for score in both)) / max(positions + static, 1)


def static_curve(scores: Sequence[BatchScore], window: int = CURVE_WINDOW) -> list[CurveValue]:
    """Return the curve of the frozen draft, from its first simulation."""
    start = next((i for i, score in enumerate(scores) if score.static_accepted is not None), len(scores))
    offset = sum(score.tokens for score in scores[:start])
    frozen = [score._replace(accepted=score.static_accepted or 0) for score in scores[start:]]
    return [CurveValue(offset + value.tokens, value.accepted_per_step) for value in learning_curve(frozen, window)]


def level_at(values: Iterable[CurveValue], tokens: int) -> float | None:
    """Return the value of a curve at so many tokens; None if the stream ends before."""
    return next((value.accepted_per_step for value in values if value.tokens >= tokens), None)


def count_output_tokens(scores: Iterable[BatchScore], tokens: int) -> int:
    """Count the output tokens among the first so many tokens of traffic; the others are prompts."""
    scores = list(scores)
    ends = accumulate(score.tokens for score in scores)
    return sum(score.output_tokens for end, score in zip(ends, scores, strict=True) if end <= tokens)


def mean_of_hybrid(scores: Iterable[BatchScore]) -> float:
    """Return the accepted tokens per step of the verify steps with the suffix drafter in the same tree."""
    steps = [score.drafters.hybrid for score in scores if score.drafters is not None]
    return sum(step.accepted for step in steps) / max(sum(step.verify_steps for step in steps), 1)


def median_reached(values: Sequence[float | None]) -> float | None:
    """Return the median if more than half of the seeds reached the level; the others count as infinite."""
    reached = [float("inf") if value is None else value for value in values]
    middle = median(reached)
    return None if middle == float("inf") else middle


class SeedInterval(NamedTuple):
    """A mean over seeds with its 95 % confidence interval; no bounds with a single seed."""

    mean: float
    low: float | None
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def summary(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {name: None if value is None else round(value, 4) for name, value in self._asdict().items()}


def mean_interval(values: Sequence[float]) -> SeedInterval:
    """Return Student's interval for the mean over the seeds."""
    mean, n = fmean(values), len(values)
    if n == 1:
        return SeedInterval(mean, None, None)
    half = _T_975[min(n - 1, len(_T_975)) - 1] * stdev(values) / n**0.5
    return SeedInterval(mean, mean - half, mean + half)


def paired_interval(values: Sequence[float], others: Sequence[float]) -> SeedInterval:
    """Return the interval for the difference of two variants, seed by seed in the same order."""
    return mean_interval([a - b for a, b in zip(values, others, strict=True)])
