"""What a comparison is made of: trials in turn, ratios of each trial, and goals."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.bench.paired import Figure, Goal, Rates, Samples, interleaved, percentile, ratio


def test_arms_run_in_turn_and_every_second_trial_in_the_opposite_order() -> None:
    ran: list[tuple[str, int]] = []

    def arm(name: str, trial: int) -> int:
        ran.append((name, trial))
        return 1

    interleaved({"a": lambda t: arm("a", t), "b": lambda t: arm("b", t)}, trials=3)
    assert ran == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]


def test_a_rate_is_tokens_over_the_time_of_the_arm_alone() -> None:
    def sleeping(seconds: float) -> int:
        time.sleep(seconds)
        return 10

    rates = interleaved({"sleeps": lambda _: sleeping(0.05), "slow": lambda _: sleeping(0.2)}, trials=1)
    assert 0 < rates["sleeps"].clock.median <= 10 / 0.05
    assert rates["sleeps"].processor.median > rates["sleeps"].clock.median, "sleeping takes no processor time"


def test_an_arm_is_prepared_each_time_before_it_runs_and_outside_of_its_time() -> None:
    told: list[str] = []

    def prepare(name: str) -> None:
        told.append(f"prepare {name}")
        time.sleep(0.1)

    def arm(name: str) -> int:
        told.append(name)
        time.sleep(0.001)
        return 1

    rates = interleaved({"a": lambda _: arm("a"), "b": lambda _: arm("b")}, trials=2, prepare=prepare)
    assert told == ["prepare a", "a", "prepare b", "b", "prepare b", "b", "prepare a", "a"]
    assert max(rates["a"].clock.values) > 10


def test_the_processor_time_is_that_of_whoever_does_the_work() -> None:
    used = iter([5.0, 7.0])
    rates = interleaved({"a": lambda _: 10}, trials=1, processor=lambda: next(used))
    assert rates["a"].processor.median == 5


def test_a_comparison_is_the_median_of_the_trials_own_ratios() -> None:
    def rates(*values: float) -> Rates:
        return Rates(Samples(values), Samples(tuple(2 * value for value in values)))

    measured = {"ours": rates(10, 100, 30), "theirs": rates(5, 100, 10), "other": rates(1, 1, 1)}
    figure = ratio("ours_vs_theirs", measured, "ours", "theirs", goal=Goal(2, at_least=True))
    assert figure.samples == Samples((2, 1, 3))
    assert (figure.value, figure.met) == (2, True)
    told = figure.summary()
    assert told["tokens_per_s"] == {"ours": 30, "theirs": 10}
    assert told["by_processor_time"] == 2
    assert told["ratios"]["samples"] == [2, 1, 3]


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (Goal(1.5, at_least=True), 1.5, True),
        (Goal(1.5, at_least=True), 1.49, False),
        (Goal(1.03, at_least=False), 1.03, True),
        (Goal(1.03, at_least=False), 1.04, False),
        (Goal(1.03, at_least=False), None, None),
        (None, 1.0, None),
    ],
)
def test_a_goal_is_met_missed_or_cannot_be_told(goal: Goal | None, value: float | None, met: bool | None) -> None:
    assert Figure("figure", value, goal=goal).met is met


def test_a_figure_that_could_not_be_measured_says_why() -> None:
    told = Figure("peer", None, goal=Goal(1, at_least=True), detail={"why": "not installed"}).summary()
    assert (told["value"], told["met"], told["why"]) == (None, None, "not installed")


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.sampled_from([0.5, 0.99]))
def test_a_percentile_is_one_of_the_values_and_leaves_at_most_the_rest_above(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value > found for value in values) <= (1 - share) * len(values)
