"""A sequential test of two versions on live traffic: it may be looked at after every request, and stopped at any look.

What is compared are two ratios of sums, output tokens per second and output tokens per verify step (the accepted
tokens per step
and one, for the target's own token). A ratio of sums is what a fleet gets out of its machines. It lets a request that
two versions served count on both sides with its verify steps there, and a request of three tokens weighs three tokens:
means over requests would be at the mercy of the shortest ones. Differences are of logarithms, that is, relative.

Requests that one node serves at one time share its load, so they are no independent draws. What is taken as independent
is a *group*: all that a node did in one slice of time, in which it served one version. The variance of a ratio is that
of its groups' residuals (delta method; Deng, Knoblich and Lu 2018, "Applying the Delta Method in Metric Analytics").
Labels are compared each for itself, and the difference over all of them is the mean of theirs, weighted by traffic:
a label that one side happens to see more often moves nothing.

With D the difference so far and V its variance, D / V is asymptotically a Brownian motion in the time 1 / V, with the
true difference as its drift (the canonical process of group sequential tests; Jennison and Turnbull 1999, section 3.1).
Against a difference of at most ``theta`` it is bet with a half-normal mixture, which gives a test martingale (Howard
et al. 2021, arXiv 1810.08240, proposition 6; as mSPRT, Johari et al. 2017, arXiv 1512.04922; with estimated variances,
Waudby-Smith et al. 2021, arXiv 2103.06476). By Ville's inequality it ever reaches 1 / alpha with a chance of at most
alpha, however often one looks.

Shapes: g groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

Figure = Literal["tokens per second", "tokens per verify step"]
FIGURES: tuple[Figure, Figure] = ("tokens per second", "tokens per verify step")

SOUGHT = 0.05
"""Scale of the mixture: differences of this size are found with the least traffic, others soon after."""
LEAST_GROUPS = 5
"""Groups below which the variance between them is no estimate."""
_LEAST_VARIANCE = 1e-6
"""Of a difference: two versions that always accept the same have none at all, which no estimate is worth."""


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """What one version did on one label, by group."""

    group: I64
    """[g] which node and slice of time, counted from 0, each once; numbers mean the same in all labels."""
    requests: I64
    """[g] that began there."""
    tokens: F64
    """[g] of answers, the target's own included."""
    verify_steps: F64
    """[g] verify steps."""
    seconds: F64
    """[g] that requests spent in those verify steps."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a trial asks for."""

    margin: float
    """Share by which a version may be slower and still count as no worse."""
    error: float
    """Chance of promoting a version that is worse by the margin, and of taking back one that is not worse at all."""
    min_requests: int
    """Of the labels that are looked at, on each side. A label is looked at from a quarter of them on each side on, and
    half the groups; until then its requests are in no figure."""
    min_groups: int = 20
    """That each side needs: with few the variance between them is a guess."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One figure of both versions, on one label or over all."""

    figure: Figure
    label: str | None
    """None over all labels."""
    new: float
    old: float
    difference: float
    """Share by which the new one is better, other things equal; over all labels the mean of theirs."""
    low: float
    high: float
    """The difference is within, at all looks of a trial, but for the chance ``Rule.error``."""
    better: float
    """Log of the evidence that the new version is not worse by the margin; 0 is none."""
    worse: float
    """Log of the evidence that it is worse."""
    share: float
    """Of the evidence that anything is worse."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a comparison stands."""

    new_requests: int
    """Of labels that are looked at."""
    old_requests: int
    enough: bool
    """Whether there is enough traffic to decide at all."""
    overall: tuple[Estimate, ...] = ()
    labels: tuple[Estimate, ...] = ()


Outcome = Literal["promote", "back", "go on"]


class Decision(NamedTuple):
    """What follows from a comparison."""

    outcome: Outcome
    why: str


def compare(new: Mapping[str, Served], old: Mapping[str, Served], rule: Rule) -> Standing:
    """Both versions on the same labels.

    Args:
        new: By label, in the order in which the labels were first seen.
        old: The same of the version that it is compared with; labels that only one side served are left out.
        rule: What to ask for.

    Where a side was not timed, tokens per second are in no figure.
    """
    labels = [label for label in new if label in old and all(_is_enough(side[label], rule) for side in (new, old))]
    sides = [[side[label] for label in labels] for side in (new, old)]
    new_requests, old_requests = (sum(int(served.requests.sum()) for served in side) for side in sides)
    if not labels:
        return Standing(new_requests, old_requests, enough=False)
    groups = min(len(set(np.concatenate([served.group for served in side]).tolist())) for side in sides)
    enough = min(new_requests, old_requests) >= rule.min_requests and groups >= rule.min_groups
    overall, by_label = [], []
    seen = {label: number for number, label in enumerate(new, start=1)}
    timed = all(float(served.seconds.sum()) > 0 for side in sides for served in side)
    for figure in FIGURES if timed else FIGURES[1:]:
        ratios = [_Difference(_ratio(n, figure), _ratio(o, figure)) for n, o in zip(*sides, strict=True)]
        overall.append(_estimate(figure, None, ratios, rule, _share(None)))
        by_label += [
            _estimate(figure, label, [ratio], rule, _share(seen[label]))
            for label, ratio in zip(labels, ratios, strict=True)
        ]
    return Standing(new_requests, old_requests, enough, tuple(overall), tuple(by_label))


def decide(standing: Standing, rule: Rule) -> Decision:
    """Whether the evidence is enough to end a trial.

    Worse: the mean of the evidence over figures and labels reaches 1 / error. A mean of test martingales is one, so
    the chance of taking back a version that is nowhere worse stays below the error, whatever the number of labels; it
    is never weaker than Bonferroni's correction. Not worse: both figures, each for itself at the same error, since both
    have to agree; and no label may look worse by more than the margin.
    """
    if not standing.enough:
        return Decision("go on", f"{standing.new_requests} and {standing.old_requests} requests: too few to tell")
    wanted = -math.log(rule.error)
    if _worse(standing) >= wanted:
        worst = max((*standing.overall, *standing.labels), key=lambda estimate: estimate.worse)
        return Decision("back", f"worse: {told(worst)}")
    if all(estimate.better >= wanted for estimate in standing.overall):
        below = bound(standing, rule)
        if below is None:
            return Decision("promote", f"not worse: {'; '.join(told(estimate) for estimate in standing.overall)}")
        return Decision("go on", f"not worse over all, but it seems so: {told(below)}")
    return Decision("go on", "; ".join(told(estimate) for estimate in standing.overall))


def bound(standing: Standing, rule: Rule) -> Estimate | None:
    """The lowest estimate, if it is below the margin."""
    lowest = min((*standing.overall, *standing.labels), key=lambda estimate: estimate.difference)
    return lowest if lowest.difference < -rule.margin else None


def told(estimate: Estimate) -> str:
    """An estimate in words."""
    where = "" if estimate.label is None else f" on label {estimate.label or 'none'}"
    return (
        f"{estimate.figure}{where} {estimate.new:.2f} against {estimate.old:.2f} "
        f"({estimate.difference:+.1%}, between {estimate.low:+.1%} and {estimate.high:+.1%})"
    )


def _is_enough(served: Served, rule: Rule) -> bool:
    groups = max(rule.min_groups // 2, LEAST_GROUPS)
    return len(served.group) >= groups and int(served.requests.sum()) * 4 >= rule.min_requests


class _Ratio(NamedTuple):
    """Log of a ratio of sums."""

    log: float
    groups: I64
    residuals: F64
    """[g] by how much each group moves the log; their squares add up to its variance."""
    tokens: float

    @property
    def value(self) -> float:
        return math.exp(self.log)


class _Difference(NamedTuple):
    new: _Ratio
    old: _Ratio

    @property
    def value(self) -> float:
        return self.new.log - self.old.log

    @property
    def weight(self) -> float:
        """What traffic of both sides it stands on (Cochran, Mantel, Haenszel)."""
        return self.new.tokens * self.old.tokens / (self.new.tokens + self.old.tokens)


def _ratio(served: Served, figure: Figure) -> _Ratio:
    below = served.seconds if figure == "tokens per second" else served.verify_steps
    tokens = float(served.tokens.sum())
    ratio = tokens / float(below.sum())
    count = len(served.group)
    # Of few groups the variance is as likely too small as too large: what it costs a t-test is added here.
    residuals = (served.tokens - ratio * below) / tokens * math.sqrt(count / (count - 3))
    return _Ratio(math.log(ratio), served.group, residuals, tokens)


def _share(seen: int | None) -> float:
    """Of the evidence that anything is worse: half of a figure's is for all labels together.

    Of the other half the label that was seen as the j-th has 1 / (j (j + 1)). That adds up to one over any number of
    labels, and does not change when another one comes.
    """
    halves = 2 * len(FIGURES)
    return 1 / halves if seen is None else 1 / (halves * seen * (seen + 1))


def _estimate(
    figure: Figure, label: str | None, differences: Sequence[_Difference], rule: Rule, share: float
) -> Estimate:
    """Of one label, or the mean over several."""
    total = sum(difference.weight for difference in differences)
    weights = [difference.weight / total for difference in differences]
    value = sum(weight * difference.value for weight, difference in zip(weights, differences, strict=True))
    variance = sum(_variance([d[side] for d in differences], weights) for side in range(2))
    time = 1 / max(variance, _LEAST_VARIANCE)
    reach = _reach(time, rule.error)
    new, old = (
        math.exp(sum(weight * d[side].log for weight, d in zip(weights, differences, strict=True))) for side in range(2)
    )
    return Estimate(
        figure,
        label,
        new,
        old,
        math.expm1(value),
        math.expm1(value - reach),
        math.expm1(value + reach),
        log_evidence((value - math.log1p(-rule.margin)) * time, time),
        log_evidence(-value * time, time),
        share,
    )


def _variance(ratios: Sequence[_Ratio], weights: Sequence[float]) -> float:
    """Of the weighted mean of logs of ratios; what the labels of one group have in common is added up first."""
    groups = np.concatenate([ratio.groups for ratio in ratios])
    moved = np.concatenate([weight * ratio.residuals for weight, ratio in zip(weights, ratios, strict=True)])
    return float((np.bincount(groups, moved) ** 2).sum())


def log_evidence(moved: float, time: float) -> float:
    """Log of the half-normal mixture martingale of a Brownian motion that stands at ``moved`` at ``time``.

    It starts at 0, and grows while the motion drifts upwards; ``SOUGHT`` is the scale of the drifts it bets on.
    """
    spread = 1 + SOUGHT**2 * time
    z = SOUGHT * moved / math.sqrt(spread)
    return math.log(2) - math.log(spread) / 2 + z * z / 2 + _log_normal_cdf(z)


def _log_normal_cdf(z: float) -> float:
    if z > -30:
        return math.log(math.erfc(-z / math.sqrt(2)) / 2)
    return -z * z / 2 - math.log(-z * math.sqrt(2 * math.pi))


def _reach(time: float, error: float) -> float:
    """Half the width of the confidence sequence: the two-sided normal mixture of the same scale."""
    spread = 1 + SOUGHT**2 * time
    return math.sqrt(spread * (math.log(spread) - 2 * math.log(error))) / (SOUGHT * time)


def _worse(standing: Standing) -> float:
    """Log of the mean evidence that anything is worse."""
    parts = [estimate.worse + math.log(estimate.share) for estimate in (*standing.overall, *standing.labels)]
    largest = max(parts)
    return largest + math.log(sum(math.exp(part - largest) for part in parts))
