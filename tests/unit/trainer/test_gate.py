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
        ([("sql", 0.46, 4), ("chat", 0.9, 20)], None),
        ([("sql", 0.44, 4), ("chat", 0.9, 20)], "label sql 1.440 against 1.500 on 4 samples"),
        ([("sql", 0.1, 3), ("chat", 0.9, 20)], None),
        ([("sql", 0.3, 4), ("", 0.2, 4)], "label none 1.200"),
        ([(None, 0.2, 4)], "the other labels 1.200"),
    ],
)
def test_a_candidate_that_is_better_over_all_must_not_lose_on_a_label(
    labels: list[tuple[str | None, float, int]], lost: str | None
) -> None:
    on = [
        LabelComparison(label=label, accepted_per_step=length, champion_accepted_per_step=0.5, samples=samples)
        for label, length, samples in labels
    ]
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


def test_figures_of_labels_are_among_those_that_are_written_down() -> None:
    on = LabelComparison(label="sql", accepted_per_step=0.4, champion_accepted_per_step=0.3, samples=4)
    held_out = HeldOutComparison(
        accepted_per_step=0.8, champion="3", champion_accepted_per_step=0.5, samples=24, labels=(on,)
    )
    assert held_out.figures["accepted_per_step/sql"] == 0.4
    assert HeldOutComparison.from_tags({HELD_OUT_TAG: held_out.model_dump_json()}) == held_out


def test_a_version_without_an_interval_is_not_promoted() -> None:
    held_out = HeldOutComparison(accepted_per_step=9, champion="3", champion_accepted_per_step=0, samples=20)
    verdict = judge_candidate("4", "3", {HELD_OUT_TAG: held_out.model_dump_json()}, PromoterSettings())
    assert (verdict.promote, "without an interval" in verdict.why) == (False, True)


def plain_gain(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the gain and its standard error of (gained tokens, positions) by request."""
    positions = sum(p for _, p in pairs)
    gain = sum(d for d, _ in pairs) / positions
    squares = sum((d - gain * p) ** 2 for d, p in pairs)
    return gain, math.sqrt(squares / (len(pairs) - 1) * len(pairs)) / positions


@pytest.mark.parametrize("requests", [5, 12, 40])
def test_the_interval_of_a_gain_equals_a_plain_bootstrap(requests: int) -> None:
    gained_R, positions_R = simulate_requests(np.random.default_rng(requests), requests, gain=0.1)
    pairs = list(zip(gained_R.tolist(), positions_R.tolist(), strict=True))
    gain, deviation = plain_gain(pairs)
    off = []
    for drawn in np.random.default_rng(SEED).integers(requests, size=(RESAMPLES, requests)).tolist():
        again, spread = plain_gain([pairs[r] for r in drawn])
        off.append((again - gain) / spread if spread > 1e-12 else math.inf)
    above = sorted(off)[math.ceil((RESAMPLES - 1) * (1 - ERROR))]
    below = sorted(-one if one == math.inf else one for one in off)[math.floor((RESAMPLES - 1) * ERROR)]
    interval = estimate_gain(gained_R, positions_R, ERROR)
    assert interval == pytest.approx((gain - above * deviation, gain - below * deviation, requests))
    assert interval == estimate_gain(gained_R, positions_R, ERROR), "the same requests have the same interval"


def test_too_few_requests_that_differ_have_no_interval() -> None:
    positions_R = np.full(20, 50.0)
    for different in (1, 2):
        assert estimate_gain(np.where(np.arange(20) < different, 9.0, 0.0), positions_R, ERROR) is None
    assert estimate_gain(np.array([9.0]), np.array([50.0]), ERROR) is None


@pytest.mark.parametrize("gained", [0.0, 0.3])
def test_requests_that_do_not_differ_have_exact_bounds(gained: float) -> None:
    positions_R = np.arange(10.0, 90, 10)
    assert estimate_gain(gained * positions_R, positions_R, ERROR) == pytest.approx((gained, gained, 8))


@pytest.mark.parametrize("requests", [4, 8, 32])
def test_a_candidate_equal_to_the_champion_passes_at_most_at_the_nominal_rate(requests: int) -> None:
    trials, passed, above_zero = 600, 0, 0
    for trial in range(trials):
        gained_R, positions_R = simulate_requests(np.random.default_rng([requests, trial]), requests, gain=0.0)
        interval = estimate_gain(gained_R, positions_R, ERROR)
        passed += interval is not None and interval.low > 0
        above_zero += gained_R.sum() > 0
    assert passed / trials <= ERROR + 3 * math.sqrt(ERROR * (1 - ERROR) / trials)
    assert above_zero / trials > 0.4, "a comparison of means passes every second one"


def test_a_true_gain_passes_with_enough_requests() -> None:
    passed = {}
    for requests in (8, 200):
        draws = (simulate_requests(np.random.default_rng(trial), requests, gain=0.1) for trial in range(200))
        found = [estimate_gain(gained_R, positions_R, ERROR) for gained_R, positions_R in draws]
        passed[requests] = sum(one is not None and one.low > 0 for one in found) / len(found)
    assert passed[8] < 0.5
    assert passed[200] > 0.95


def simulate_requests(generator: np.random.Generator, requests: int, gain: float) -> tuple[F64, F64]:
    """Return gained tokens and positions of requests of different lengths, on which each version has its own luck."""
    positions_R = generator.integers(10, 120, size=requests)
    base_R, luck_2R = generator.uniform(0.1, 0.7, size=requests), generator.normal(0, 0.05, size=(2, requests))
    chance_2R = np.clip(base_R + luck_2R + np.array([[gain / 3], [0]]), 0, 1)
    own_R, champion_R = generator.binomial(3 * positions_R, chance_2R)
    return (own_R - champion_R).astype(np.float64), positions_R.astype(np.float64)
