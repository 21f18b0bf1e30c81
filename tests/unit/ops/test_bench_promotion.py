"""The simulated trials: what is drawn, and what is made of their outcomes."""

from __future__ import annotations

import numpy as np
import pytest

from ops.bench.promotion import TRAFFIC, Course, Fleet, judge, serve, trial
from trainer.release.sequential_test import Criteria

RULE = Criteria(0.05, 0.05, 200)
FLEET = Fleet(slices=60)


def test_simulated_traffic_is_what_was_measured() -> None:
    is_new = np.zeros((200, 8), np.bool_)
    sums = serve(Fleet(slices=200), is_new, 1.1, np.random.default_rng(0))
    for number, traffic in enumerate(TRAFFIC.values()):
        requests, tokens, verify_steps, _ = (float(column[..., number].sum()) for column in sums)
        assert verify_steps / requests == pytest.approx(traffic.verify_steps, rel=0.05)
        assert tokens / verify_steps == pytest.approx(1 + traffic.kept, rel=0.05)
    faster = serve(Fleet(slices=200), ~is_new, 1.1, np.random.default_rng(0))
    assert faster.tokens.sum() == pytest.approx(1.1 * sums.tokens.sum())
    assert faster.seconds.sum() == pytest.approx(sums.seconds.sum())


def test_a_trial_is_the_same_whenever_it_is_simulated() -> None:
    assert trial(FLEET, RULE, 0.8, 3) == trial(FLEET, RULE, 0.8, 3)
    assert trial(FLEET, RULE, 0.8, 3).outcome == "rollback"
    assert trial(FLEET, RULE, 1.2, 3).outcome == "promote"
    assert trial(FLEET, RULE, 0.8, 3, keep=True).outcome == "undecided"


def test_figures_count_the_outcomes_that_are_wrong_and_those_that_are_right() -> None:
    promoted, back, undecided = Course("promote", 100), Course("rollback", 300), Course("undecided", 999)
    courses = {
        "equal": [promoted, promoted, back, undecided],
        "at_margin": [back, back, back, promoted],
        "kept": [undecided, undecided, promoted, promoted],
        "slower": [back, Course("rollback", 500), undecided, undecided],
        "faster": [promoted] * 4,
    }
    figures = {figure.name: figure for figure in judge(courses, RULE)}
    assert (figures["false_promotion_rate"].value, figures["false_promotion_rate"].met) == (0.25, False)
    assert figures["false_promotion_rate_if_never_taken_back"].value == 0.5
    assert (figures["false_rollback_rate"].value, figures["equal_promoted"].value) == (0.25, 0.5)
    power = figures["power_at_5_percent"]
    assert (power.value, (power.detail or {})["of"], (power.detail or {})["requests_median"]) == (
        0.5,
        "slower_taken_back",
        400,
    )
