"""Sequential test of two versions on live traffic: valid at every look, and it may stop at any look.

The test compares two ratios of sums: output tokens per second, and output tokens per verify step (acceptance length,
bonus token included). A ratio of sums is the throughput that a fleet gets out of its machines. It counts a request that
two versions served on both sides, with the verify steps of each, and weighs a request of three tokens as three tokens;
means over requests would be dominated by the shortest ones. Differences are of logarithms, that is, relative.

Requests that one node serves at one time share its load, so they are not independent draws. The independent unit is a
*group*: everything that a node did in one slice of time, in which it served one version. A ratio has the variance of
its groups' residuals (delta method; Deng, Knoblich and Lu 2018, "Applying the Delta Method in Metric Analytics").
Labels are compared separately, and the overall difference is their mean, weighted by traffic: a label that one side
happens to see more often changes nothing.

With D the difference so far and V its variance, D / V is asymptotically a Brownian motion in the time 1 / V, with the
true difference as its drift (the canonical process of group sequential tests; Jennison and Turnbull 1999, section 3.1).
A bet against a difference of at most ``theta`` with a half-normal mixture gives a test martingale (Howard et al. 2021,
arXiv 1810.08240, proposition 6; as mSPRT, Johari et al. 2017, arXiv 1512.04922; with estimated variances, Waudby-Smith
et al. 2021, arXiv 2103.06476). By Ville's inequality the martingale ever reaches 1 / alpha with probability at most
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

Figure = Literal["tokens per second", "acceptance length"]
FIGURES: tuple[Figure, Figure] = ("tokens per second", "acceptance length")

MIXTURE_SCALE = 0.05
"""Scale of the mixture: differences of this size need the least traffic, others soon follow."""
MIN_LABEL_GROUPS = 5
"""Groups below which the variance between them is no usable estimate."""
_MIN_VARIANCE = 1e-6
"""Floor of a difference's variance: two versions that always accept the same have none, which no estimate justifies."""


@dataclass(frozen=True, slots=True, eq=False)
class ServedTraffic:
    """Sums of one version on one label, by group."""

    group: I64
    """[g] node and slice of time, numbered from 0, each once; numbers mean the same in all labels."""
    requests: I64
    """[g] requests that began there."""
    tokens: F64
    """[g] output tokens, bonus tokens included."""
    verify_steps: F64
    """[g] verify steps."""
    seconds: F64
    """[g] time that requests spent in those verify steps."""


@dataclass(frozen=True, slots=True)
class Criteria:
    """Requirements of a comparison."""

    margin: float
    """Relative difference by which a version may be slower and still count as not worse."""
    error: float
    """Probability of promoting a version that is worse by the margin, and of rolling back one that is not worse."""
    min_requests: int
    """Of the labels that are compared, on each side. A label is compared once each side has a quarter of these requests
    and half the groups; until then its requests are in no figure."""
    min_groups: int = 20
    """On each side: with few groups the variance between them is a guess."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """One figure of both versions, on one label or overall."""

    figure: Figure
    label: str | None
    """None overall."""
    new: float
    old: float
    difference: float
    """Relative difference by which the new version is better on equal traffic; overall, the mean over labels."""
    low: float
    high: float
    """Confidence sequence: holds the difference at all looks at once, but for the probability ``Criteria.error``."""
    better: float
    """Log of the evidence that the new version is not worse by the margin; 0 is none."""
    worse: float
    """Log of the evidence that the new version is worse."""
    share: float
    """Weight of this estimate in the evidence that anything is worse."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two versions on the same labels."""

    new_requests: int
    """On labels that are compared."""
    old_requests: int
    enough: bool
    """Whether there is enough traffic to decide at all."""
    overall: tuple[Estimate, ...] = ()
    labels: tuple[Estimate, ...] = ()


Outcome = Literal["promote", "rollback", "continue"]


class Decision(NamedTuple):
    """Outcome of a comparison, and its reason."""

    outcome: Outcome
    why: str


def compare(new: Mapping[str, ServedTraffic], old: Mapping[str, ServedTraffic], criteria: Criteria) -> Comparison:
    """Compare both versions on the same labels.

    If a side has no times, tokens per second are not compared.

    Args:
        new: By label, in the order in which the labels were first seen.
        old: The same of the other version; labels that only one side served are ignored.
        criteria: Traffic that a comparison needs.
    """
    labels = [label for label in new if label in old and all(_is_enough(side[label], criteria) for side in (new, old))]
    sides = [[side[label] for label in labels] for side in (new, old)]
    new_requests, old_requests = (sum(int(served.requests.sum()) for served in side) for side in sides)
    if not labels:
        return Comparison(new_requests, old_requests, enough=False)
    groups = min(len(set(np.concatenate([served.group for served in side]).tolist())) for side in sides)
    enough = min(new_requests, old_requests) >= criteria.min_requests and groups >= criteria.min_groups
    overall, by_label = [], []
    order = {label: number for number, label in enumerate(new, start=1)}
    timed = all(float(served.seconds.sum()) > 0 for side in sides for served in side)
    for figure in FIGURES if timed else FIGURES[1:]:
        ratios = [_Difference(_ratio(n, figure), _ratio(o, figure)) for n, o in zip(*sides, strict=True)]
        overall.append(_estimate(figure, None, ratios, criteria, _share(None)))
        by_label += [
            _estimate(figure, label, [ratio], criteria, _share(order[label]))
            for label, ratio in zip(labels, ratios, strict=True)
        ]
    return Comparison(new_requests, old_requests, enough, tuple(overall), tuple(by_label))


def decide(comparison: Comparison, criteria: Criteria) -> Decision:
    """Decide whether the evidence is enough to end a canary analysis.

    Rollback: the mean evidence over figures and labels that something is worse reaches 1 / error. A mean of test
    martingales is a test martingale, so the probability of rolling back a version that is nowhere worse stays below the
    error, whatever the number of labels; the test is never weaker than Bonferroni's correction. Promotion: each figure
    at the same error, since both have to agree; and no label may look worse by more than the margin.
    """
    if not comparison.enough:
        return Decision(
            "continue", f"{comparison.new_requests} and {comparison.old_requests} requests: too few to decide"
        )
    threshold = -math.log(criteria.error)
    if _log_evidence_of_worse(comparison) >= threshold:
        worst = max((*comparison.overall, *comparison.labels), key=lambda estimate: estimate.worse)
        return Decision("rollback", f"worse: {describe(worst)}")
    if all(estimate.better >= threshold for estimate in comparison.overall):
        below = find_below_margin(comparison, criteria)
        if below is None:
            return Decision("promote", f"not worse: {'; '.join(map(describe, comparison.overall))}")
        return Decision("continue", f"not worse overall, but it seems worse: {describe(below)}")
    return Decision("continue", "; ".join(map(describe, comparison.overall)))


def find_below_margin(comparison: Comparison, criteria: Criteria) -> Estimate | None:
    """Return the lowest estimate if it is below the margin."""
    lowest = min((*comparison.overall, *comparison.labels), key=lambda estimate: estimate.difference)
    return lowest if lowest.difference < -criteria.margin else None


def describe(estimate: Estimate) -> str:
    """Return an estimate as text."""
    where = "" if estimate.label is None else f" on label {estimate.label or 'none'}"
    return (
        f"{estimate.figure}{where} {estimate.new:.2f} against {estimate.old:.2f} "
        f"({estimate.difference:+.1%}, between {estimate.low:+.1%} and {estimate.high:+.1%})"
    )


def _is_enough(served: ServedTraffic, criteria: Criteria) -> bool:
    groups = max(criteria.min_groups // 2, MIN_LABEL_GROUPS)
    return len(served.group) >= groups and int(served.requests.sum()) * 4 >= criteria.min_requests


class _Ratio(NamedTuple):
    """Log of a ratio of sums."""

    log: float
    groups: I64
    residuals: F64
    """[g] contribution of each group to the log; the sum of their squares is its variance."""
    tokens: float


class _Difference(NamedTuple):
    new: _Ratio
    old: _Ratio

    @property
    def value(self) -> float:
        return self.new.log - self.old.log

    @property
    def weight(self) -> float:
        """Traffic of both sides behind the difference (Cochran, Mantel, Haenszel)."""
        return self.new.tokens * self.old.tokens / (self.new.tokens + self.old.tokens)


def _ratio(served: ServedTraffic, figure: Figure) -> _Ratio:
    denominator = served.seconds if figure == "tokens per second" else served.verify_steps
    tokens = float(served.tokens.sum())
    ratio = tokens / float(denominator.sum())
    count = len(served.group)
    # With few groups the variance estimate is noisy; this factor widens the interval as a t-test would.
    residuals = (served.tokens - ratio * denominator) / tokens * math.sqrt(count / (count - 3))
    return _Ratio(math.log(ratio), served.group, residuals, tokens)


def _share(order: int | None) -> float:
    """Return the weight of an estimate in the evidence that anything is worse.

    Half the weight of a figure is for the overall estimate (None), half for all labels together. The label that was
    seen as the j-th has 1 / (j (j + 1)) of that half. These parts sum to one over any number of labels, and do not
    change when another label appears.
    """
    halves = 2 * len(FIGURES)
    return 1 / halves if order is None else 1 / (halves * order * (order + 1))


def _estimate(
    figure: Figure, label: str | None, differences: Sequence[_Difference], criteria: Criteria, share: float
) -> Estimate:
    """Return the estimate of one label, or the mean over several."""
    total = sum(difference.weight for difference in differences)
    weights = [difference.weight / total for difference in differences]
    value = sum(weight * difference.value for weight, difference in zip(weights, differences, strict=True))
    variance = sum(_variance([d[side] for d in differences], weights) for side in range(2))
    time = 1 / max(variance, _MIN_VARIANCE)
    half_width = _half_width(time, criteria.error)
    new, old = (
        math.exp(sum(weight * d[side].log for weight, d in zip(weights, differences, strict=True))) for side in range(2)
    )
    return Estimate(
        figure,
        label,
        new,
        old,
        math.expm1(value),
        math.expm1(value - half_width),
        math.expm1(value + half_width),
        log_evidence((value - math.log1p(-criteria.margin)) * time, time),
        log_evidence(-value * time, time),
        share,
    )


def _variance(ratios: Sequence[_Ratio], weights: Sequence[float]) -> float:
    """Return the variance of the weighted mean of logs of ratios; sum the residuals of a group over labels first."""
    groups = np.concatenate([ratio.groups for ratio in ratios])
    residuals = np.concatenate([weight * ratio.residuals for weight, ratio in zip(weights, ratios, strict=True)])
    return float((np.bincount(groups, residuals) ** 2).sum())


def log_evidence(position: float, time: float) -> float:
    """Return the log of the half-normal mixture martingale of a Brownian motion at ``position`` at ``time``.

    It starts at 0, and grows while the motion drifts upwards; ``MIXTURE_SCALE`` is the scale of the drifts it bets on.
    """
    spread = 1 + MIXTURE_SCALE**2 * time
    z = MIXTURE_SCALE * position / math.sqrt(spread)
    return math.log(2) - math.log(spread) / 2 + z * z / 2 + _log_normal_cdf(z)


def _log_normal_cdf(z: float) -> float:
    if z > -30:
        return math.log(math.erfc(-z / math.sqrt(2)) / 2)
    return -z * z / 2 - math.log(-z * math.sqrt(2 * math.pi))


def _half_width(time: float, error: float) -> float:
    """Return half the width of the confidence sequence: the two-sided normal mixture of the same scale."""
    spread = 1 + MIXTURE_SCALE**2 * time
    return math.sqrt(spread * (math.log(spread) - 2 * math.log(error))) / (MIXTURE_SCALE * time)


def _log_evidence_of_worse(comparison: Comparison) -> float:
    """Return the log of the mean evidence that anything is worse."""
    parts = [estimate.worse + math.log(estimate.share) for estimate in (*comparison.overall, *comparison.labels)]
    largest = max(parts)
    return largest + math.log(sum(math.exp(part - largest) for part in parts))
