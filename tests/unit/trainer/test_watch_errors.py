"""The post-promotion watch errs at most as often as its criteria say, also on traffic that drifts, and finds versions
that are worse together, although each of them serves for little more than a slice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from simulated_canary import CHAMPION, LINE, Fleet, simulate

from schemas.settings import Canary, Promoter
from trainer.release.live_figures import LiveFigures, ServingPeriod
from trainer.release.promotion_policy import watch_criteria
from trainer.release.sequential_test import Comparison, compare, decide

CRITERIA = watch_criteria(Promoter())
FLEET = Fleet(nodes=4, slices=120, share=Canary().anchor_share)
SETTINGS = Canary(slice_duration=FLEET.slice_s, burn_in=FLEET.cold_s)
LIFETIME_S = FLEET.slice_s * 40 / 30
"""40 s, where a slice has the default 30 s."""
DRIFT = {"of nodes": (0.0, 0.1), "of the fleet, 10 %": (0.1, 0.1), "of the fleet, 20 %": (0.2, 0.1)}
"""Standard deviations of fleet and node, of the log of acceptance and of time per verify step."""
RUNS = 60
AT_MOST = CRITERIA.error + 3 * math.sqrt(CRITERIA.error * (1 - CRITERIA.error) / RUNS)
"""Three standard deviations of the simulation above the nominal error."""


def comparisons(fleet: Fleet, seed: int, gain: float) -> Iterator[Comparison]:
    """Yield what the promoter sees while a watch goes on, at growing intervals."""
    tables, begin = simulate(fleet, seed, gain, LIFETIME_S)
    live, seen = LiveFigures(tables, SETTINGS), 20.0
    while seen <= fleet.slices:
        until = begin + int(seen) * fleet.slice_s
        starts = [begin + number * LIFETIME_S for number in range(math.ceil((until - begin) / LIFETIME_S))]
        promoted = [ServingPeriod(str(number), since, until) for number, since in enumerate(starts, start=2)]
        yield compare(*live.read_traffic(LINE, promoted, [ServingPeriod(CHAMPION, begin, until)]), CRITERIA)
        seen *= 1.15


def watch(fleet: Fleet, seed: int, gain: float) -> str:
    """Return how a watch ends."""
    outcomes = (decide(comparison, CRITERIA).outcome for comparison in comparisons(fleet, seed, gain))
    return next((outcome for outcome in outcomes if outcome != "continue"), "continue")


def drifting(kind: str) -> Fleet:
    fleet, node = DRIFT[kind]
    return replace(FLEET, fleet_deviation=fleet, node_deviation=node)


@pytest.mark.parametrize("kind", DRIFT)
def test_versions_as_good_as_the_anchor_are_rarely_rolled_back_whatever_drifts(kind: str) -> None:
    outcomes = Counter(watch(drifting(kind), seed, 1.0) for seed in range(RUNS))
    assert outcomes["rollback"] <= AT_MOST * RUNS


def test_versions_that_are_worse_by_the_margin_rarely_move_the_anchor() -> None:
    outcomes = Counter(watch(FLEET, seed, 1 - CRITERIA.margin) for seed in range(RUNS))
    assert outcomes["promote"] <= AT_MOST * RUNS


@pytest.mark.parametrize("kind", DRIFT)
def test_short_lived_versions_that_are_worse_are_found_in_little_traffic(kind: str) -> None:
    outcomes = Counter(watch(drifting(kind), seed, 0.8) for seed in range(20))
    assert outcomes["rollback"] >= 15
