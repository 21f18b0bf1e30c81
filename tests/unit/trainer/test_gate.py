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


def plain_gain(own: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the gain and its standard error of (accepted tokens, verify steps) of two versions by prompt."""
    own_steps, other_steps = sum(steps for _, steps in own), sum(steps for _, steps in other)
    ratio, other_ratio = sum(tokens for tokens, _ in own) / own_steps, sum(tokens for tokens, _ in other) / other_steps
    squares = sum(
        ((a - ratio * s) / own_steps - (b - other_ratio * t) / other_steps) ** 2
        for (a, s), (b, t) in zip(own, other, strict=True)
    )
    return ratio - other_ratio, math.sqrt(squares / (len(own) - 1) * len(own))


@pytest.mark.parametrize("prompts", [5, 12, 40])
def test_the_interval_of_a_gain_equals_a_plain_bootstrap(prompts: int) -> None:
    own_P2, other_P2 = simulate_prompts(np.random.default_rng(prompts), prompts, gain=0.1)
    own, other = own_P2.tolist(), other_P2.tolist()
    gain, deviation = plain_gain(own, other)
    off = []
    for drawn in np.random.default_rng(SEED).integers(prompts, size=(RESAMPLES, prompts)).tolist():
        again, spread = plain_gain([own[p] for p in drawn], [other[p] for p in drawn])
        off.append((again - gain) / spread if spread > 1e-12 else math.inf)
    above = sorted(off)[math.ceil((RESAMPLES - 1) * (1 - ERROR))]
    below = sorted(-one if one == math.inf else one for one in off)[math.floor((RESAMPLES - 1) * ERROR)]
    interval = estimate_gain(own_P2, other_P2, ERROR)
    assert interval == pytest.approx((gain - above * deviation, gain - below * deviation, prompts))
    assert interval == estimate_gain(own_P2, other_P2, ERROR), "the same prompts have the same interval"


def test_too_few_prompts_that_differ_have_no_interval() -> None:
    other_P2 = np.tile([3.0, 50.0], (20, 1))
    for different in (1, 2):
        own_P2 = other_P2 + np.where(np.arange(20) < different, 9.0, 0.0)[:, None] * [1, -0.5]
        assert estimate_gain(own_P2, other_P2, ERROR) is None
    assert estimate_gain(own_P2[:1], other_P2[:1], ERROR) is None


@pytest.mark.parametrize("gained", [0.0, 0.3])
def test_prompts_that_do_not_differ_have_exact_bounds(gained: float) -> None:
    steps_P = np.arange(10.0, 90, 10)
    own_P2, other_P2 = (np.stack([a * s, s], axis=1) for a, s in ((0.2 + gained, steps_P), (0.2, 1.5 * steps_P)))
    assert estimate_gain(own_P2, other_P2, ERROR) == pytest.approx((gained, gained, 8))


@pytest.mark.parametrize("prompts", [4, 8, 32])
def test_a_candidate_equal_to_the_champion_passes_at_most_at_the_nominal_rate(prompts: int) -> None:
    trials, passed, above_zero = 600, 0, 0
    for trial in range(trials):
        own_P2, other_P2 = simulate_prompts(np.random.default_rng([prompts, trial]), prompts, gain=0.0)
        interval = estimate_gain(own_P2, other_P2, ERROR)
        passed += interval is not None and interval.low > 0
        above_zero += gain_of_means(own_P2, other_P2) > 0
    assert passed / trials <= ERROR + 3 * math.sqrt(ERROR * (1 - ERROR) / trials)
    assert above_zero / trials > 0.4, "a comparison of means passes every second one"


def test_a_true_gain_passes_with_enough_prompts() -> None:
    passed = {}
    for prompts in (8, 200):
        draws = (simulate_prompts(np.random.default_rng(trial), prompts, gain=0.1) for trial in range(200))
        found = [estimate_gain(own_P2, other_P2, ERROR) for own_P2, other_P2 in draws]
        passed[prompts] = sum(one is not None and one.low > 0 for one in found) / len(found)
    assert passed[8] < 0.5
    assert passed[200] > 0.95


def simulate_prompts(generator: np.random.Generator, prompts: int, gain: float) -> tuple[F64, F64]:
    """Return accepted tokens and verify steps, of a version and the champion, of prompts of different lengths.

    On each prompt each version has its own luck with its tokens and its number of steps.
    """
    steps_2P = generator.integers(10, 120, size=prompts) + generator.integers(0, 10, size=(2, prompts))
    base_P, luck_2P = generator.uniform(0.1, 0.7, size=prompts), generator.normal(0, 0.05, size=(2, prompts))
    chance_2P = np.clip(base_P + luck_2P + np.array([[gain / 3], [0]]), 0, 1)
    counts_2P2 = np.stack([generator.binomial(3 * steps_2P, chance_2P), steps_2P], axis=-1).astype(np.float64)
    return counts_2P2[0], counts_2P2[1]


def gain_of_means(own_P2: F64, other_P2: F64) -> float:
    (own, steps), (other, other_steps) = own_P2.sum(axis=0), other_P2.sum(axis=0)
    return float(own / steps - other / other_steps)


def test_a_candidate_equal_to_the_champion_on_four_labels_seldom_loses_on_one() -> None:
    trials, lost, below_margin = 300, 0, 0
    for trial in range(trials):
        labels = []
        for label in range(4):
            own_P2, other_P2 = simulate_prompts(np.random.default_rng([label, trial]), 8, gain=0.0)
            interval, mean = estimate_gain(own_P2, other_P2, ERROR), gain_of_means(own_P2, other_P2)
            labels.append(compare_label(str(label), 0.5 + mean, interval and interval.high, 8))
        held_out = HeldOutComparison(
            accepted_per_step=1, champion="3", champion_accepted_per_step=0, samples=32, labels=tuple(labels)
        )
        lost += held_out.find_regression(margin=0.05, min_samples=4) is not None
        below_margin += any(label.accepted_per_step < 0.45 for label in labels)
    assert lost / trials <= 4 * ERROR + 3 * math.sqrt(4 * ERROR * (1 - 4 * ERROR) / trials)
    assert below_margin / trials > 0.4, "means lose on a label almost every second time"


def test_a_true_loss_on_a_label_is_found() -> None:
    found = 0
    for trial in range(200):
        own_P2, other_P2 = simulate_prompts(np.random.default_rng(trial), 16, gain=-0.3)
        interval = estimate_gain(own_P2, other_P2, ERROR)
        found += interval is not None and interval.high < 0
    assert found / 200 > 0.9
