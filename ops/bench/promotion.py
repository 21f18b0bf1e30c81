"""How often the trial of a version decides wrongly, how often rightly, and on how much traffic.

A fleet is simulated, request by request; its figures come from a fixed seed, so they are the same on every machine.
What it draws from was measured on the recorded traffic of ``aurora bench learning``: four kinds of requests with 46 to
61 verify steps (standard deviation 14 to 24) that keep 0.41 to 0.64 drafted tokens a verify step (0.28 to 0.41 between
requests). Machines and load are assumed: a node is up to some tenths faster than another, the load of a slice of time
moves all of its requests by 15 %, and one request in a hundred meets a stall that makes it four times as long. Some
requests run on into the next slice, and are served by two versions.

The test is asked after every slice, as the promoter would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ops.bench import machine
from ops.bench.outcome import Report
from ops.bench.paired import Figure, Goal, percentile
from schemas.settings import Settings
from trainer.release.registration import code_revision
from trainer.release.sequential_test import F64, I64, Criteria, Decision, ServedTraffic, compare, decide

Mask = npt.NDArray[np.bool_]

QUICK = 60
POWER_AT = 0.05
"""Difference of speed that a trial is asked to recognise."""


class Traffic(NamedTuple):
    """One label."""

    share: float
    """Of requests."""
    verify_steps: float
    verify_steps_deviation: float
    kept: float
    """Drafted tokens kept a verify step, mean over requests."""
    kept_deviation: float


TRAFFIC = {
    "chat": Traffic(0.4, 61, 19, 0.50, 0.38),
    "code": Traffic(0.3, 55, 22, 0.45, 0.28),
    "math": Traffic(0.2, 59, 14, 0.64, 0.35),
    "sql": Traffic(0.1, 46, 24, 0.41, 0.41),
}
VERIFY_STEP_S = 0.05
NODE_DEVIATION = 0.2
LOAD_DEVIATION = 0.15
REQUEST_DEVIATION = 0.2
"""Of the log of a request's time a verify step, beside node and load."""
STALLED, STALL = 0.01, 4.0
CUT = 0.1
"""Share of requests that run on into the next slice."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Who serves, and how much."""

    nodes: int = 8
    share: float = 0.2
    """Of the time in which a node serves the new version."""
    requests: float = 8
    """That begin on a node in a slice, on average."""
    slices: int = 500


@dataclass(frozen=True, slots=True)
class Course:
    """What one trial came to."""

    outcome: str
    """``undecided`` where the traffic ended first."""
    requests: int
    """Of both versions, when it was decided."""


class Sums(NamedTuple):
    """What came of each slice, node and label: [t, n, l]."""

    requests: I64
    tokens: F64
    verify_steps: F64
    seconds: F64


def run(settings: Settings, runs: int, hint: Callable[[str], None]) -> Report:
    """Simulate trials of versions that are equal, just so bad that they must not be promoted, slower, and faster."""
    promoter = settings.promoter
    rule = Criteria(promoter.canary_margin, promoter.canary_error, promoter.canary_min_requests)
    fleet = Fleet()
    effects = {"equal": 1.0, "at_margin": 1 - rule.margin, "slower": 1 - POWER_AT, "faster": 1 + POWER_AT}
    by_effect: dict[float, list[Course]] = {}
    for effect in dict.fromkeys(effects.values()):
        hint(f"{runs} trials of a version that is {effect:g} times as fast as the champion")
        by_effect[effect] = [trial(fleet, rule, effect, seed) for seed in range(runs)]
    courses = {name: by_effect[effect] for name, effect in effects.items()}
    hint(f"{runs} trials of a version that is {1 - rule.margin:g} times as fast, none of which is taken back")
    courses["kept"] = [trial(fleet, rule, 1 - rule.margin, seed, keep=True) for seed in range(runs)]
    about = {
        "runs": runs,
        "rule": asdict(rule),
        "fleet": asdict(fleet),
        "traffic": {label: traffic._asdict() for label, traffic in TRAFFIC.items()},
    }
    title = f"promotion: {runs} simulated trials of each kind"
    return Report(title, machine.describe(1), code_revision(), about, tuple(judge(courses, rule)))


def judge(courses: Mapping[str, Sequence[Course]], rule: Criteria) -> Iterator[Figure]:
    """The figures of the simulated trials.

    A false promotion is one of a version that is worse by exactly the margin, the hardest case of those that must not
    be promoted; a false rollback is one of a version that is equal. That such a version is mostly taken back before
    says nothing of the test that promotes, so its share of errors is also told for trials that never take back.
    """
    asked = Goal(rule.error, at_least=False)
    yield _rate("false_promotion_rate", courses["at_margin"], "promote", asked)
    yield _rate("false_promotion_rate_if_never_taken_back", courses["kept"], "promote", asked)
    yield _rate("false_rollback_rate", courses["equal"], "rollback", asked)
    yield _rate("equal_promoted", courses["equal"], "promote")
    faster = _rate("faster_promoted", courses["faster"], "promote")
    slower = _rate("slower_taken_back", courses["slower"], "rollback")
    yield from (faster, slower)
    weaker = min(faster, slower, key=lambda figure: figure.value or 0.0)
    yield Figure("power_at_5_percent", weaker.value, detail={"of": weaker.name, **(weaker.detail or {})})


def trial(fleet: Fleet, rule: Criteria, effect: float, seed: int, *, keep: bool = False) -> Course:
    """One trial of a version that gets ``effect`` times as many tokens out of a verify step; ``keep`` never takes it
    back.
    """
    random = np.random.default_rng(seed)
    is_new = random.random((fleet.slices, fleet.nodes)) < fleet.share
    sums = serve(fleet, is_new, effect, random)
    for looked in range(1, fleet.slices + 1):
        decision = look(sums, is_new, looked, rule, keep=keep)
        if decision.outcome != "continue":
            return Course(decision.outcome, int(sums.requests[:looked].sum()))
    return Course("undecided", int(sums.requests.sum()))


def serve(fleet: Fleet, is_new: Mask, effect: float, random: np.random.Generator) -> Sums:
    """Draw the requests of a trial, and add up what they come to.

    Args:
        fleet: Who serves.
        is_new: [t, n] where the new version serves.
        effect: Its tokens a verify step over those of the old one.
        random: What to draw from.
    """
    shape = (*is_new.shape, len(TRAFFIC))
    shares = np.array([traffic.share for traffic in TRAFFIC.values()])
    begun = random.poisson(fleet.requests * shares, shape)
    t, n, label = (np.repeat(at.ravel(), begun.ravel()) for at in np.indices(shape))
    many = len(t)
    columns = np.array([traffic[1:] for traffic in TRAFFIC.values()]).T
    verify_steps_mean, verify_steps_deviation, kept_mean, kept_deviation = (column[label] for column in columns)
    verify_steps = np.maximum(random.normal(verify_steps_mean, verify_steps_deviation).round(), 4)
    kept = random.gamma((kept_mean / kept_deviation) ** 2, kept_deviation**2 / kept_mean)
    pace = (
        random.normal(0, NODE_DEVIATION, fleet.nodes)[n]
        + random.normal(0, LOAD_DEVIATION, is_new.shape)[t, n]
        + random.normal(0, REQUEST_DEVIATION, many)
        + np.where(random.random(many) < STALLED, np.log(STALL), 0)
    )
    seconds = verify_steps * VERIFY_STEP_S * np.exp(pace)
    here = np.where(random.random(many) < CUT, random.random(many), 1.0)
    later = np.minimum(t + 1, fleet.slices - 1)
    tokens, sent, took = (np.zeros(shape) for _ in range(3))
    for at, share in ((t, here), (later, 1 - here)):
        gained = np.where(is_new[at, n], effect, 1.0)
        np.add.at(tokens, (at, n, label), share * verify_steps * (1 + kept) * gained)
        np.add.at(sent, (at, n, label), share * verify_steps)
        np.add.at(took, (at, n, label), share * seconds)
    return Sums(begun, tokens, sent, took)


def look(sums: Sums, is_new: Mask, looked: int, rule: Criteria, *, keep: bool = False) -> Decision:
    """What the test says after so many slices; ``keep`` makes nothing of evidence that the version is worse."""
    group = np.arange(looked * is_new.shape[1]).reshape(looked, -1)
    new, old = (_side(sums, side, group, looked) for side in (is_new[:looked], ~is_new[:looked]))
    standing = compare(new, old, rule)
    if keep:
        unseen = [replace(estimate, worse=0.0) for estimate in standing.overall]
        standing = replace(standing, overall=tuple(unseen), labels=())
    return decide(standing, rule)


def _side(sums: Sums, served: Mask, group: I64, looked: int) -> dict[str, ServedTraffic]:
    found = {}
    for number, label in enumerate(TRAFFIC):
        there = served & (sums.verify_steps[:looked, :, number] > 0)
        found[label] = ServedTraffic(
            group[there],
            sums.requests[:looked, :, number][there],
            sums.tokens[:looked, :, number][there],
            sums.verify_steps[:looked, :, number][there],
            sums.seconds[:looked, :, number][there],
        )
    return found


def _rate(name: str, courses: Sequence[Course], outcome: str, goal: Goal | None = None) -> Figure:
    """How often trials ended so, and after how many requests."""
    took = [course.requests for course in courses if course.outcome == outcome]
    traffic = {"requests_median": round(median(took)), "requests_p90": percentile(took, 0.9)} if took else {}
    undecided = sum(course.outcome == "undecided" for course in courses) / len(courses)
    return Figure(name, len(took) / len(courses), goal=goal, detail={**traffic, "undecided": round(undecided, 4)})
