"""The canary analysis errs at most as often as ``promoter.canary_error`` says, also on traffic that is not independent
from slice to slice, and with swaps that cost acceptance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
from simulated_canary import CANARY, CHAMPION, LINE, Fleet, simulate

from schemas.settings import Canary
from trainer.release.live_figures import LiveFigures, ServingPeriod
from trainer.release.sequential_test import Comparison, Criteria, compare, decide

FLEET = Fleet()
CRITERIA = Criteria(margin=0.05, error=0.05, min_requests=100)
SETTINGS = Canary(slice_duration=FLEET.slice_s, burn_in=FLEET.cold_s)
RUNS = 80
AT_MOST = CRITERIA.error + 3 * math.sqrt(CRITERIA.error * (1 - CRITERIA.error) / RUNS)
"""Three standard deviations of the simulation above the nominal error."""


def comparisons(fleet: Fleet, seed: int, gain: float) -> Iterator[Comparison]:
    """Yield what the promoter sees while a run goes on, at growing intervals: evidence grows with the log of time."""
    tables, begin = simulate(fleet, seed, gain)
    live, seen = LiveFigures(tables, SETTINGS), 20.0
    while seen <= fleet.slices:
        until = begin + int(seen) * fleet.slice_s
        sides = ([ServingPeriod(version, begin, until)] for version in (CANARY, CHAMPION))
        yield compare(*live.read_traffic(LINE, *sides), CRITERIA)
        seen *= 1.15


def is_ended(fleet: Fleet, seed: int, gain: float, outcome: str) -> bool:
    """Return whether the analysis of a run ever has an outcome, if the other outcome does not end it before."""
    for comparison in comparisons(fleet, seed, gain):
        if outcome == "promote":
            blind = tuple(replace(estimate, worse=0.0) for estimate in comparison.overall)
            comparison = replace(comparison, overall=blind, labels=())  # noqa: PLW2901 - evidence of worse is ignored
        if decide(comparison, CRITERIA).outcome == outcome:
            return True
    return False


def error_rate(fleet: Fleet, gain: float, outcome: str) -> float:
    return sum(is_ended(fleet, seed, gain, outcome) for seed in range(RUNS)) / RUNS


def test_an_equal_canary_is_rarely_rolled_back() -> None:
    assert error_rate(FLEET, 1.0, "rollback") <= AT_MOST


def test_a_canary_that_is_worse_by_the_margin_is_rarely_promoted() -> None:
    assert error_rate(FLEET, 1 - CRITERIA.margin, "promote") <= AT_MOST


@pytest.mark.parametrize(("gain", "outcome"), [(0.85, "rollback"), (1.1, "promote")])
def test_a_clear_difference_is_found(gain: float, outcome: str) -> None:
    found = sum(is_ended(FLEET, seed, gain, outcome) for seed in range(20))
    assert found >= 15
