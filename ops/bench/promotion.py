"""``aurora bench promotion``: how often a canary analysis decides wrongly, how often rightly, and on how much traffic.

A fleet is simulated, request by request, from a fixed seed: the figures are the same on every machine. The
distributions were measured on the recorded traffic of ``aurora bench learning``: four kinds of requests with 46 to 61
verify steps (standard deviation 14 to 24) that accept 0.41 to 0.64 draft tokens per step (0.28 to 0.41 between
requests). Nodes and load are assumed: one node is up to some tenths faster than another, the load of a time slice
moves all of its requests by 15 %, and one request in a hundred meets a stall that makes it four times as long. Some
requests extend into the next slice and count there too, for the version that is active then: this makes slices depend
on each other.

The test decides after every slice, as in the promoter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ops.bench.harness import Figure, Goal, Report, Say, Session, percentile
from schemas.settings import Settings
from trainer.release.sequential_test import F64, I64, Criteria, Decision, ServedTraffic, compare, decide

Mask = npt.NDArray[np.bool_]

QUICK_RUNS = 60
POWER_AT = 0.05
"""Difference of speed that the analysis should detect."""


class LabelTraffic(NamedTuple):
    """The requests of one label."""

    share: float
    """Of all requests."""
    steps: float
    """Verify steps per request."""
    steps_deviation: float
    accepted: float
    """Accepted tokens per step, mean over requests."""
    accepted_deviation: float


TRAFFIC = {
    "chat": LabelTraffic(0.4, 61, 19, 0.50, 0.38),
    "code": LabelTraffic(0.3, 55, 22, 0.45, 0.28),
    "math": LabelTraffic(0.2, 59, 14, 0.64, 0.35),
    "sql": LabelTraffic(0.1, 46, 24, 0.41, 0.41),
}
STEP_S = 0.05
NODE_DEVIATION = 0.2
LOAD_DEVIATION = 0.15
REQUEST_DEVIATION = 0.2
"""Of the log of a request's time per step, beside node and load."""
STALLED, STALL = 0.01, 4.0
CUT = 0.1
"""Share of requests that extend into the next slice."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The simulated nodes and their load."""

    nodes: int = 8
    share: float = 0.2
    """Of the time in which a node serves the canary."""
    requests: float = 8
    """Mean number of requests that start on a node in a slice."""
    slices: int = 500


@dataclass(frozen=True, slots=True)
class CanaryOutcome:
    """The outcome of one simulated canary analysis."""

    outcome: str
    """``undecided`` if the traffic ended first."""
    requests: int
    """Of both versions, at the decision."""


class SliceSums(NamedTuple):
    """Sums of each slice, node and label: [t, n, l]."""

    requests: I64
    tokens: F64
    steps: F64
    seconds: F64


def run(settings: Settings, runs: int, say: Say) -> Report:
    """Simulate canaries that are equal, worse by exactly the margin, slower, and faster."""
    session, promoter, fleet = Session(threads=1), settings.promoter, Fleet()
    rule = Criteria(promoter.canary_margin, promoter.canary_error, promoter.canary_min_requests)
    effects = {"equal": 1.0, "at_margin": 1 - rule.margin, "slower": 1 - POWER_AT, "faster": 1 + POWER_AT}
    by_effect: dict[float, list[CanaryOutcome]] = {}
    for effect in dict.fromkeys(effects.values()):
        say(f"{runs} analyses of a canary with {effect:g} times the speed of the champion")
        by_effect[effect] = [simulate_canary(fleet, rule, effect, seed) for seed in range(runs)]
    outcomes = {name: by_effect[effect] for name, effect in effects.items()}
    say(f"{runs} analyses of a canary with {1 - rule.margin:g} times the speed, without rollback")
    outcomes["kept"] = [simulate_canary(fleet, rule, 1 - rule.margin, seed, keep=True) for seed in range(runs)]
    about = {
        "runs": runs,
        "rule": asdict(rule),
        "fleet": asdict(fleet),
        "traffic": {label: traffic._asdict() for label, traffic in TRAFFIC.items()},
    }
    return session.report(f"promotion: {runs} simulated canaries of each kind", about, judge(outcomes, rule))


def judge(outcomes: Mapping[str, Sequence[CanaryOutcome]], rule: Criteria) -> Iterator[Figure]:
    """Return the figures of the simulated analyses.

    A false promotion is one of a canary that is worse by exactly the margin, the hardest case that must not be
    promoted. A false rollback is one of a canary that is equal. Most canaries at the margin are rolled back early,
    which hides the error of the test that promotes: that error is also reported for analyses without rollback.
    """
    at_most = Goal(rule.error, at_least=False)
    yield _rate("false_promotion_rate", outcomes["at_margin"], "promote", at_most)
    yield _rate("false_promotion_rate_without_rollback", outcomes["kept"], "promote", at_most)
    yield _rate("false_rollback_rate", outcomes["equal"], "rollback", at_most)
    yield _rate("equal_promoted", outcomes["equal"], "promote")
    faster = _rate("faster_promoted", outcomes["faster"], "promote")
    slower = _rate("slower_rolled_back", outcomes["slower"], "rollback")
    yield from (faster, slower)
    weaker = min(faster, slower, key=lambda figure: figure.value or 0.0)
    yield Figure("power_at_5_percent", weaker.value, detail={"of": weaker.name, **weaker.detail})


def simulate_canary(fleet: Fleet, rule: Criteria, effect: float, seed: int, *, keep: bool = False) -> CanaryOutcome:
    """Simulate one analysis.

    Args:
        fleet: The nodes and their load.
        rule: The rule of the promoter.
        effect: Tokens per verify step of the canary over those of the champion.
        seed: Of all draws.
        keep: Disable the rollback.
    """
    random = np.random.default_rng(seed)
    is_canary = random.random((fleet.slices, fleet.nodes)) < fleet.share
    sums = simulate_traffic(fleet, is_canary, effect, random)
    for seen in range(1, fleet.slices + 1):
        decision = _decide(sums, is_canary, seen, rule, keep=keep)
        if decision.outcome != "continue":
            return CanaryOutcome(decision.outcome, int(sums.requests[:seen].sum()))
    return CanaryOutcome("undecided", int(sums.requests.sum()))


def simulate_traffic(fleet: Fleet, is_canary: Mask, effect: float, random: np.random.Generator) -> SliceSums:
    """Draw the requests of one analysis and add them up.

    Args:
        fleet: The nodes and their load.
        is_canary: [t, n] True where the canary serves.
        effect: Tokens per verify step of the canary over those of the champion.
        random: Source of the draws.
    """
    shape = (*is_canary.shape, len(TRAFFIC))
    shares = np.array([traffic.share for traffic in TRAFFIC.values()])
    started = random.poisson(fleet.requests * shares, shape)
    t, n, label = (np.repeat(at.ravel(), started.ravel()) for at in np.indices(shape))
    number = len(t)
    columns = np.array([traffic[1:] for traffic in TRAFFIC.values()]).T
    steps_mean, steps_deviation, accepted_mean, accepted_deviation = (column[label] for column in columns)
    steps = np.maximum(random.normal(steps_mean, steps_deviation).round(), 4)
    accepted = random.gamma((accepted_mean / accepted_deviation) ** 2, accepted_deviation**2 / accepted_mean)
    pace = (
        random.normal(0, NODE_DEVIATION, fleet.nodes)[n]
        + random.normal(0, LOAD_DEVIATION, is_canary.shape)[t, n]
        + random.normal(0, REQUEST_DEVIATION, number)
        + np.where(random.random(number) < STALLED, np.log(STALL), 0)
    )
    seconds = steps * STEP_S * np.exp(pace)
    first = np.where(random.random(number) < CUT, random.random(number), 1.0)
    later = np.minimum(t + 1, fleet.slices - 1)
    tokens, sum_steps, sum_seconds = (np.zeros(shape) for _ in range(3))
    for at, share in ((t, first), (later, 1 - first)):
        gain = np.where(is_canary[at, n], effect, 1.0)
        np.add.at(tokens, (at, n, label), share * steps * (1 + accepted) * gain)
        np.add.at(sum_steps, (at, n, label), share * steps)
        np.add.at(sum_seconds, (at, n, label), share * seconds)
    return SliceSums(started, tokens, sum_steps, sum_seconds)


def _decide(sums: SliceSums, is_canary: Mask, seen: int, rule: Criteria, *, keep: bool) -> Decision:
    """Return the decision of the test after ``seen`` slices; ``keep`` ignores evidence that the canary is worse."""
    group = np.arange(seen * is_canary.shape[1]).reshape(seen, -1)
    canary, champion = (_of_version(sums, served, group, seen) for served in (is_canary[:seen], ~is_canary[:seen]))
    comparison = compare(canary, champion, rule)
    if keep:
        blind = [replace(estimate, worse=0.0) for estimate in comparison.overall]
        comparison = replace(comparison, overall=tuple(blind), labels=())
    return decide(comparison, rule)


def _of_version(sums: SliceSums, served: Mask, group: I64, seen: int) -> dict[str, ServedTraffic]:
    by_label = {}
    for number, label in enumerate(TRAFFIC):
        there = served & (sums.steps[:seen, :, number] > 0)
        requests, (tokens, steps, seconds) = sums.requests[:seen, :, number], (c[:seen, :, number] for c in sums[1:])
        by_label[label] = ServedTraffic(group[there], requests[there], tokens[there], steps[there], seconds[there])
    return by_label


def _rate(name: str, outcomes: Sequence[CanaryOutcome], outcome: str, goal: Goal | None = None) -> Figure:
    """Return the share of analyses with that outcome, and after how many requests it came."""
    seen = [one.requests for one in outcomes if one.outcome == outcome]
    traffic = {"requests_median": round(median(seen)), "requests_p90": percentile(seen, 0.9)} if seen else {}
    undecided = sum(one.outcome == "undecided" for one in outcomes) / len(outcomes)
    return Figure(name, len(seen) / len(outcomes), goal=goal, detail={**traffic, "undecided": round(undecided, 4)})
