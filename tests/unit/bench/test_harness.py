"""Alternating trials, ratios by trial, goals and percentiles."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.bench.harness import Figure, Goal, Rates, TrialValues, compare_arms, percentile, run_alternating


def test_every_second_trial_runs_the_arms_in_the_opposite_order() -> None:
    ran: list[tuple[str, int]] = []

    def arm(name: str, trial: int) -> int:
        ran.append((name, trial))
        return 1

    run_alternating({"a": lambda t: arm("a", t), "b": lambda t: arm("b", t)}, trials=3)
    assert ran == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]


def test_a_rate_is_tokens_over_the_time_of_its_arm() -> None:
    def sleeping(seconds: float) -> int:
        time.sleep(seconds)
        return 10

    rates = run_alternating({"sleeps": lambda _: sleeping(0.05), "slow": lambda _: sleeping(0.2)}, trials=1)
    assert 0 < rates["sleeps"].clock.median <= 10 / 0.05
    assert rates["sleeps"].processor.median > rates["sleeps"].clock.median, "sleeping takes no processor time"


def test_the_time_of_a_preparation_counts_for_no_arm() -> None:
    events: list[str] = []

    def prepare(name: str) -> None:
        events.append(f"prepare {name}")
        time.sleep(0.1)

    def arm(name: str) -> int:
        events.append(name)
        time.sleep(0.001)
        return 1

    rates = run_alternating({"a": lambda _: arm("a"), "b": lambda _: arm("b")}, trials=2, prepare=prepare)
    assert events == ["prepare a", "a", "prepare b", "b", "prepare b", "b", "prepare a", "a"]
    assert max(rates["a"].clock.values) > 10


def test_the_processor_time_is_that_of_the_process_that_does_the_work() -> None:
    used = iter([5.0, 7.0])
    rates = run_alternating({"a": lambda _: 10}, trials=1, processor_s=lambda: next(used))
    assert rates["a"].processor.median == 5


def test_a_comparison_is_the_median_of_the_ratios_by_trial() -> None:
    def rates(*values: float) -> Rates:
        return Rates(TrialValues(values), TrialValues(tuple(2 * value for value in values)))

    measured = {"ours": rates(10, 100, 30), "theirs": rates(5, 100, 10), "other": rates(1, 1, 1)}
    figure = compare_arms("ours_vs_theirs", measured, "ours", "theirs", goal=Goal(2, at_least=True))
    assert figure.ratios == TrialValues((2, 1, 3))
    assert (figure.value, figure.met) == (2, True)
    summary = figure.summary()
    assert summary["tokens_per_s"] == {"ours": 30, "theirs": 10}
    assert summary["by_processor_time"] == 2
    assert summary["ratios"]["samples"] == [2, 1, 3]


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
def test_a_goal_is_met_missed_or_unknown(goal: Goal | None, value: float | None, met: bool | None) -> None:
    assert Figure("figure", value, goal=goal).met is met


def test_an_unmeasured_figure_has_the_reason() -> None:
    summary = Figure("peer", None, goal=Goal(1, at_least=True), detail={"why": "not installed"}).summary()
    assert (summary["value"], summary["met"], summary["why"]) == (None, None, "not installed")


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.sampled_from([0.5, 0.99]))
def test_a_percentile_is_one_of_the_values(values: list[float], share: float) -> None:
    found = percentile(values, share)
    assert found in values
    assert sum(value > found for value in values) <= (1 - share) * len(values)


def test_a_line_and_a_row_show_the_ratio_by_processor_time_next_to_that_by_the_clock() -> None:
    figure = Figure("ratio", 1.5, goal=Goal(2, at_least=True), detail={"by_processor_time": 1.25})
    assert str(figure) == "ratio: 1.500 (by processor time 1.250; goal >= 2, missed)"
    assert figure.cells == ("ratio", "1.500", "", "1.250", ">= 2", "missed")
    assert str(Figure("wait", 3.0, "ms")) == "wait: 3.000 ms"
