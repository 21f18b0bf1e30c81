"""Simulated canary analyses: the drawn traffic, and the figures of their outcomes."""

from __future__ import annotations

import numpy as np
import pytest

from ops.bench.promotion import TRAFFIC, CanaryOutcome, Fleet, judge, simulate_canary, simulate_traffic
from trainer.release.sequential_test import Criteria

RULE = Criteria(0.05, 0.05, 200)
FLEET = Fleet(slices=60)


def test_simulated_traffic_has_the_measured_means() -> None:
    is_canary = np.zeros((200, 8), np.bool_)
    sums = simulate_traffic(Fleet(slices=200), is_canary, 1.1, np.random.default_rng(0))
    for number, traffic in enumerate(TRAFFIC.values()):
        requests, tokens, verify_steps, _ = (float(column[..., number].sum()) for column in sums)
        assert verify_steps / requests == pytest.approx(traffic.steps, rel=0.05)
        assert tokens / verify_steps == pytest.approx(1 + traffic.accepted, rel=0.05)
    faster = simulate_traffic(Fleet(slices=200), ~is_canary, 1.1, np.random.default_rng(0))
    assert faster.tokens.sum() == pytest.approx(1.1 * sums.tokens.sum())
    assert faster.seconds.sum() == pytest.approx(sums.seconds.sum())


def test_an_analysis_depends_on_its_seed_alone() -> None:
    assert simulate_canary(FLEET, RULE, 0.8, 3) == simulate_canary(FLEET, RULE, 0.8, 3)
    assert simulate_canary(FLEET, RULE, 0.8, 3).outcome == "rollback"
    assert simulate_canary(FLEET, RULE, 1.2, 3).outcome == "promote"
    assert simulate_canary(FLEET, RULE, 0.8, 3, keep=True).outcome == "undecided"


def test_figures_are_shares_of_outcomes() -> None:
    promoted, back, undecided = (
        CanaryOutcome("promote", 100),
        CanaryOutcome("rollback", 300),
        CanaryOutcome("undecided", 999),
    )
    courses = {
        "equal": [promoted, promoted, back, undecided],
        "at_margin": [back, back, back, promoted],
        "kept": [undecided, undecided, promoted, promoted],
        "slower": [back, CanaryOutcome("rollback", 500), undecided, undecided],
        "faster": [promoted] * 4,
    }
    figures = {figure.name: figure for figure in judge(courses, RULE)}
    assert (figures["false_promotion_rate"].value, figures["false_promotion_rate"].met) == (0.25, False)
    assert figures["false_promotion_rate_without_rollback"].value == 0.5
    assert (figures["false_rollback_rate"].value, figures["equal_promoted"].value) == (0.25, 0.5)
    power = figures["power_at_5_percent"]
    assert (power.value, (power.detail or {})["of"], (power.detail or {})["requests_median"]) == (
        0.5,
        "slower_rolled_back",
        400,
    )
