"""The gate passes only candidates that beat the champion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from promoter_world import figures

from schemas.settings import Promoter as PromoterSettings
from trainer.release.gate import (
    F64,
    HELD_OUT_TAG,
    RESAMPLES,
    SEED,
    HeldOutComparison,
    LabelComparison,
    estimate_gain,
    judge_candidate,
)

ERROR = 0.05


@pytest.mark.parametrize(
    ("champion", "tags", "promote", "says"),
    [
        (None, figures(0.5, "day-0-head-0", 0.1), True, "better by more than"),
        ("3", figures(0.5, "3", 0.4), True, "better by more than"),
        ("3", figures(0.5, "3", 0.5), False, "not better"),
        ("3", figures(0.45, "3", 0.41), False, "promoter.gate_margin 0.05"),
        ("3", figures(0.9, "2", 0.1), False, "champion is 3, waiting for the next candidate"),
        ("3", figures(0.9, "day-0-head-0", 0.1), False, "waiting for the next candidate"),
        (None, figures(0.9, "3", 0.1), False, "champion is day-0, waiting"),
        ("3", figures(0.9, "3", 0.1, samples=7), False, "promoter.gate_min_samples requires 8"),
        ("4", figures(0.9, "3", 0.1), False, "version 4 is champion"),
        ("3", {}, False, "tag held_out"),
        ("3", {"held_out": '{"accepted_per_step": 1}'}, False, "tag held_out"),
    ],
)
def test_the_gate_promotes_only_what_beat_the_present_champion(
    champion: str | None, tags: Mapping[str, str], promote: bool, says: str
) -> None:
    verdict = judge_candidate("4", champion, tags, PromoterSettings(gate_margin=0.05, gate_min_samples=8))
    assert verdict.promote is promote
    assert says in verdict.why


def test_without_a_candidate_nothing_is_promoted() -> None:
    assert judge_candidate(None, "1", {}, PromoterSettings()).promote is False


@pytest.mark.parametrize(
    ("labels", "lost"),
    [
        ([("sql", 0.46, -0.01, 4), ("chat", 0.9, 0.6, 20)], None),
        ([("sql", 0.44, -0.01, 4), ("chat", 0.9, 0.6, 20)], "label sql 1.440 against 1.500 on 4 samples"),
        ([("sql", 0.44, 0.01, 4), ("chat", 0.9, 0.6, 20)], None),
        ([("sql", 0.1, None, 4)], None),
        ([("sql", 0.1, -0.3, 3), ("chat", 0.9, 0.6, 20)], None),
        ([("sql", 0.3, -0.1, 4), ("", 0.2, -0.1, 4)], "label none 1.200"),
        ([("sql", 0.2, 0.1, 4), ("", 0.3, -0.1, 4)], "label none 1.300"),
        ([(None, 0.2, -0.1, 4)], "the other labels 1.200"),
    ],
)
def test_a_candidate_that_is_better_over_all_must_not_lose_on_a_label_by_more_than_chance(
    labels: list[tuple[str | None, float, float | None, int]], lost: str | None
) -> None:
    on = [compare_label(*label) for label in labels]
    held_out = HeldOutComparison(
        accepted_per_step=0.8,
        champion="3",
        champion_accepted_per_step=0.5,
        gain_low=0.2,
        gain_high=0.4,
        samples=24,
        labels=tuple(on),
    )
    tags = {HELD_OUT_TAG: held_out.model_dump_json()}
    verdict = judge_candidate("4", "3", tags, PromoterSettings(gate_label_margin=0.05, gate_label_min_samples=4))
    assert verdict.promote is (lost is None)
    assert (lost or "better by more than") in verdict.why


def compare_label(label: str | None, accepted_per_step: float, high: float | None, samples: int) -> LabelComparison:
    return LabelComparison(
        label=label,
        accepted_per_step=accepted_per_step,
        champion_accepted_per_step=0.5,
        gain_low=None if high is None else high - 0.3,
        gain_high=high,
        samples=samples,
    )


def test_figures_of_labels_are_among_those_that_are_written_down() -> None:
    on = compare_label("sql", 0.4, None, 4)
    held_out = HeldOutComparison(
        accepted_per_step=0.8, champion="3", champion_accepted_per_step=0.5, samples=24, labels=(on,)
    )
    assert held_out.figures["accepted_per_step/sql"] == 0.4
    assert None not in held_out.figures.values()
    assert HeldOutComparison.from_tags({HELD_OUT_TAG: held_out.model_dump_json()}) == held_out


def test_a_version_without_an_interval_is_not_promoted() -> None:
    held_out = HeldOutComparison(accepted_per_step=9, champion="3", champion_accepted_per_step=0, samples=20)
    verdict = judge_candidate("4", "3", {HELD_OUT_TAG: held_out.model_dump_json()}, PromoterSettings())
    assert (verdict.promote, "without an interval" in verdict.why) == (False, True)


def plain_gain(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the gain and its standard error of (gained tokens, positions) by prompt."""
    positions = sum(p for _, p in pairs)
    gain = sum(d for d, _ in pairs) / positions
    squares = sum((d - gain * p) ** 2 for d, p in pairs)
    return gain, math.sqrt(squares / (len(pairs) - 1) * len(pairs)) / positions


@pytest.mark.parametrize("prompts", [5, 12, 40])
def test_the_interval_of_a_gain_equals_a_plain_bootstrap(prompts: int) -> None:
    gained_P, positions_P = simulate_prompts(np.random.default_rng(prompts), prompts, gain=0.1)
    pairs = list(zip(gained_P.tolist(), positions_P.tolist(), strict=True))
    gain, deviation = plain_gain(pairs)
    off = []
    for drawn in np.random.default_rng(SEED).integers(prompts, size=(RESAMPLES, prompts)).tolist():
        again, spread = plain_gain([pairs[p] for p in drawn])
        off.append((again - gain) / spread if spread > 1e-12 else math.inf)
    above = sorted(off)[math.ceil((RESAMPLES - 1) * (1 - ERROR))]
    below = sorted(-one if one == math.inf else one for one in off)[math.floor((RESAMPLES - 1) * ERROR)]
    interval = estimate_gain(gained_P, positions_P, ERROR)
    assert interval == pytest.approx((gain - above * deviation, gain - below * deviation, prompts))
    assert interval == estimate_gain(gained_P, positions_P, ERROR), "the same prompts have the same interval"


def test_too_few_prompts_that_differ_have_no_interval() -> None:
    positions_P = np.full(20, 50.0)
    for different in (1, 2):
        assert estimate_gain(np.where(np.arange(20) < different, 9.0, 0.0), positions_P, ERROR) is None
    assert estimate_gain(np.array([9.0]), np.array([50.0]), ERROR) is None


@pytest.mark.parametrize("gained", [0.0, 0.3])
def test_prompts_that_do_not_differ_have_exact_bounds(gained: float) -> None:
    positions_P = np.arange(10.0, 90, 10)
    assert estimate_gain(gained * positions_P, positions_P, ERROR) == pytest.approx((gained, gained, 8))


@pytest.mark.parametrize("prompts", [4, 8, 32])
def test_a_candidate_equal_to_the_champion_passes_at_most_at_the_nominal_rate(prompts: int) -> None:
    trials, passed, above_zero = 600, 0, 0
    for trial in range(trials):
        gained_P, positions_P = simulate_prompts(np.random.default_rng([prompts, trial]), prompts, gain=0.0)
        interval = estimate_gain(gained_P, positions_P, ERROR)
        passed += interval is not None and interval.low > 0
        above_zero += gained_P.sum() > 0
    assert passed / trials <= ERROR + 3 * math.sqrt(ERROR * (1 - ERROR) / trials)
    assert above_zero / trials > 0.4, "a comparison of means passes every second one"


def test_a_true_gain_passes_with_enough_prompts() -> None:
    passed = {}
    for prompts in (8, 200):
        draws = (simulate_prompts(np.random.default_rng(trial), prompts, gain=0.1) for trial in range(200))
        found = [estimate_gain(gained_P, positions_P, ERROR) for gained_P, positions_P in draws]
        passed[prompts] = sum(one is not None and one.low > 0 for one in found) / len(found)
    assert passed[8] < 0.5
    assert passed[200] > 0.95


def simulate_prompts(generator: np.random.Generator, prompts: int, gain: float) -> tuple[F64, F64]:
    """Return gained tokens and positions of prompts of different lengths, on which each version has its own luck."""
    positions_P = generator.integers(10, 120, size=prompts)
    base_P, luck_2P = generator.uniform(0.1, 0.7, size=prompts), generator.normal(0, 0.05, size=(2, prompts))
    chance_2P = np.clip(base_P + luck_2P + np.array([[gain / 3], [0]]), 0, 1)
    own_P, champion_P = generator.binomial(3 * positions_P, chance_2P)
    return (own_P - champion_P).astype(np.float64), positions_P.astype(np.float64)


def test_a_candidate_equal_to_the_champion_on_four_labels_seldom_loses_on_one() -> None:
    trials, lost, below_margin = 300, 0, 0
    for trial in range(trials):
        labels = []
        for label in range(4):
            gained_P, positions_P = simulate_prompts(np.random.default_rng([label, trial]), 8, gain=0.0)
            interval, mean = estimate_gain(gained_P, positions_P, ERROR), gained_P.sum() / positions_P.sum()
            labels.append(compare_label(str(label), 0.5 + mean, interval and interval.high, 8))
        held_out = HeldOutComparison(
            accepted_per_step=1, champion="3", champion_accepted_per_step=0, samples=32, labels=tuple(labels)
        )
        lost += held_out.find_regression(margin=0.05, min_samples=4) is not None
        below_margin += any(label.accepted_per_step < 0.45 for label in labels)
    assert lost / trials <= 4 * ERROR
    assert below_margin / trials > 0.4, "means lose on a label almost every second time"


def test_a_true_loss_on_a_label_is_found() -> None:
    found = 0
    for trial in range(200):
        gained_P, positions_P = simulate_prompts(np.random.default_rng(trial), 16, gain=-0.3)
        interval = estimate_gain(gained_P, positions_P, ERROR)
        found += interval is not None and interval.high < 0
    assert found / 200 > 0.9
