"""The sequential test weighs evidence and decides on two versions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.release.sequential_test import (
    Comparison,
    Criteria,
    Decision,
    Estimate,
    ServedTraffic,
    compare,
    decide,
    find_below_margin,
    log_evidence,
)

CRITERIA = Criteria(margin=0.05, error=0.05, min_requests=100)


def served(pace: float, groups: int = 60, *, first: int = 0, seed: int = 0, requests: int = 4) -> ServedTraffic:
    """Verify steps of a tenth of a second that each give ``pace`` tokens, more or less."""
    random = np.random.default_rng(seed)
    verify_steps = random.integers(100, 300, groups).astype(float)
    tokens = verify_steps * pace * np.exp(random.normal(0, 0.05, groups))
    seconds = verify_steps * 0.1 * np.exp(random.normal(0, 0.05, groups))
    return ServedTraffic(np.arange(first, first + groups), np.full(groups, requests), tokens, verify_steps, seconds)


def decided(new: dict[str, ServedTraffic], old: dict[str, ServedTraffic]) -> Decision:
    return decide(compare(new, old, CRITERIA), CRITERIA)


@pytest.mark.parametrize("time", [1.0, 100.0, 10_000.0])
def test_without_a_difference_the_expected_evidence_is_one(time: float) -> None:
    moved = np.linspace(-60, 60, 20_001) * math.sqrt(time)
    weighed = [log_evidence(float(x), time) - float(x) ** 2 / (2 * time) for x in moved]
    mean = sum(map(math.exp, weighed)) / math.sqrt(2 * math.pi * time) * float(moved[1] - moved[0])
    assert mean == pytest.approx(1, abs=1e-3)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_evidence_grows_with_the_position(moved: float, time: float) -> None:
    assert log_evidence(moved, time) <= log_evidence(moved + 1, time)


def test_a_faster_version_is_promoted_and_a_slower_one_rolled_back() -> None:
    old = {"": served(2.0, first=1000, seed=1)}
    assert decided({"": served(2.2)}, old).outcome == "promote"
    slower = decided({"": served(1.8)}, old)
    assert slower.outcome == "rollback"
    assert slower.why.startswith(("worse: tokens per second", "worse: acceptance length"))


def test_an_equal_version_is_promoted_once_there_is_enough_traffic() -> None:
    few = decided({"": served(2.0, 20)}, {"": served(2.0, 20, first=1000, seed=1)})
    assert few.outcome == "continue"
    assert decided({"": served(2.0, 400)}, {"": served(2.0, 400, first=1000, seed=1)}).outcome == "promote"


def test_nothing_is_decided_below_the_minimum_traffic() -> None:
    old = {"": served(2.0, first=1000)}
    assert "too few to decide" in decided({"": served(1.0, requests=1)}, old).why
    assert "too few to decide" in decided({"": served(1.0, 15, requests=99)}, old).why


def test_a_slower_label_rolls_back_a_version_that_is_faster_overall() -> None:
    new = {"chat": served(2.3, 200), "sql": served(1.5, 20, first=300, seed=2)}
    old = {"chat": served(2.0, 200, first=1000, seed=3), "sql": served(2.0, 20, first=1300, seed=4)}
    comparison = compare(new, old, CRITERIA)
    assert comparison.overall[0].difference > 0
    decision = decide(comparison, CRITERIA)
    assert decision.outcome == "rollback"
    assert "label sql" in decision.why


def test_a_label_that_seems_worse_delays_the_promotion() -> None:
    better = Estimate("tokens per second", None, 2, 2, 0.01, 0.0, 0.02, better=9.0, worse=-3.0, share=0.25)
    label = replace(better, label="sql", difference=-0.06, better=-1.0, worse=1.0, share=0.125)
    comparison = Comparison(500, 500, enough=True, overall=(better, replace(better, figure="acceptance length")))
    assert decide(comparison, CRITERIA).outcome == "promote"
    held_up = replace(comparison, labels=(label,))
    assert find_below_margin(held_up, CRITERIA) == label
    assert decide(held_up, CRITERIA).outcome == "continue"


def test_a_different_mix_of_labels_makes_no_difference() -> None:
    new = {"chat": served(1.0, 40), "sql": served(4.0, 200, first=300, seed=2)}
    old = {"chat": served(1.0, 200, first=1000, seed=3), "sql": served(4.0, 40, first=1300, seed=4)}
    for estimate in compare(new, old, CRITERIA).overall:
        assert abs(estimate.difference) < 0.03


def test_labels_of_one_group_are_not_independent() -> None:
    """Two labels with the same variation hold as much evidence as one of them."""
    new, old = served(2.0), served(2.0, first=1000, seed=1)
    one, both = compare({"a": new}, {"a": old}, CRITERIA), compare({"a": new, "b": new}, {"a": old, "b": old}, CRITERIA)
    assert both.overall[0].high == pytest.approx(one.overall[0].high)
    apart = compare({"a": new, "b": served(2.0, first=100)}, {"a": old, "b": served(2.0, first=1100, seed=1)}, CRITERIA)
    assert apart.overall[0].high < one.overall[0].high


def test_a_new_label_takes_no_evidence_from_the_others() -> None:
    new, old = {"a": served(1.9)}, {"a": served(2.0, first=1000, seed=1)}
    more = compare({**new, "b": served(2.0, 5, first=100)}, {**old, "b": served(2.0, first=1100)}, CRITERIA)
    assert more.overall == compare(new, old, CRITERIA).overall


def test_versions_without_variance_can_be_compared() -> None:
    verify_steps = np.full(60, 100.0)
    same = ServedTraffic(np.arange(60), np.full(60, 4), verify_steps, verify_steps, verify_steps / 10)
    old = ServedTraffic(
        same.group + 1000, *(column for column in (same.requests, same.tokens, same.verify_steps, same.seconds))
    )
    assert decided({"": same}, {"": old}).outcome == "promote"


def test_without_times_only_acceptance_length_is_compared() -> None:
    untimed = replace(served(1.5), seconds=np.zeros(60))
    comparison = compare({"": untimed}, {"": served(2.0, first=1000, seed=1)}, CRITERIA)
    assert [estimate.figure for estimate in comparison.overall] == ["acceptance length"]
    assert decide(comparison, CRITERIA).outcome == "rollback"
