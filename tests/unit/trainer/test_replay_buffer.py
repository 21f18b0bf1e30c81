"""How often each sample is drawn, against worked figures, and how much stale branches count."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.settings import Train
from trainer.data.replay_buffer import (
    MIN_STALENESS_WEIGHT,
    ReplayBuffer,
    ReplayEntry,
    compute_log_weights,
    draw_indices,
    staleness_weight,
    version_number,
)
from trainer.data.samples import Sample, Teacher

DRAWS = 4000


def shares(log_weights: list[float], number: int = 1) -> list[float]:
    """Return how often each index is drawn."""
    generator = random.Random(0)
    seen = Counter(i for _ in range(DRAWS) for i in draw_indices(generator, log_weights, number))
    return [seen[i] / DRAWS for i in range(len(log_weights))]


def in_sequence(weights: list[float], number: int) -> list[float]:
    """Return the same by definition: every order of draws with its probability."""
    among = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), number):
        probability, left = 1.0, sum(weights)
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        for i in order:
            among[i] += probability
    return among


@pytest.mark.parametrize("number", [1, 2, 3])
def test_draws_are_in_proportion_to_the_log_weights_of_what_is_left(number: int) -> None:
    weights = [1.0, 2.0, 4.0, 0.5]
    assert shares([math.log(w) for w in weights], number) == pytest.approx(in_sequence(weights, number), abs=0.03)


def test_no_index_is_drawn_twice_and_the_same_seed_draws_the_same() -> None:
    log_weights = [-float(i) for i in range(20)]
    drawn = [draw_indices(random.Random(3), log_weights, 12) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 12


def test_log_weights_too_small_for_a_number_are_still_ordered() -> None:
    assert draw_indices(random.Random(0), [-90_000.0, 0.0, -4_000.0], 3) == [1, 2, 0]


def test_a_sample_is_half_as_likely_with_every_half_life() -> None:
    log_weights = compute_log_weights([0, 10, 20, 30], [None] * 4, half_life=10)
    assert [math.exp(o) for o in log_weights] == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8])
    assert shares(log_weights) == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15], abs=0.03)


def test_without_half_life_and_balance_all_are_equally_likely() -> None:
    assert compute_log_weights([0, 5, 900], ["a", "a", None]) == [0, 0, 0]


@pytest.mark.parametrize(
    ("balance", "expected"),
    # 64 samples of sql, 16 of math, 4 without a label: shares in proportion to 64^(1-b) : 16^(1-b) : 4^(1-b).
    [(0.0, [64 / 84, 16 / 84, 4 / 84]), (0.5, [8 / 14, 4 / 14, 2 / 14]), (1.0, [1 / 3, 1 / 3, 1 / 3])],
)
def test_skewed_labels_are_drawn_in_the_shares_that_the_balance_says(balance: float, expected: list[float]) -> None:
    labels = ["sql"] * 64 + ["math"] * 16 + [None] * 4
    drawn = shares(compute_log_weights(list(range(84)), labels, balance=balance))
    by_label = [sum(s for s, at in zip(drawn, labels, strict=True) if at == label) for label in ("sql", "math", None)]
    assert by_label == pytest.approx(expected, abs=0.03)


def test_a_label_without_new_traffic_fades_although_labels_are_balanced() -> None:
    # Ten samples of each label; those of the label without new traffic are ten half-lives older.
    log_weights = compute_log_weights(
        [*range(10, 20), *range(10)], ["gone"] * 10 + ["here"] * 10, half_life=1, balance=1
    )
    assert sum(shares(log_weights)[:10]) == pytest.approx(2**-10, abs=0.01)


def test_a_branch_counts_half_after_every_half_life_down_to_a_minimum() -> None:
    assert [staleness_weight(behind, 4) for behind in (0, 4, 8, 12, 16, 17, 1000)] == [
        1,
        1 / 2,
        1 / 4,
        1 / 8,
        *[1 / 16] * 3,
    ]
    assert staleness_weight(1000, 0) == 1


@given(st.integers(-5, 10**9), st.floats(0, 1e6))
def test_staleness_stays_within_its_bounds_and_never_rises(behind: int, half_life: float) -> None:
    weight = staleness_weight(behind, half_life)
    assert MIN_STALENESS_WEIGHT <= weight <= 1
    assert staleness_weight(behind + 1, half_life) <= weight


def test_a_draft_without_a_number_has_version_0() -> None:
    assert [version_number(s) for s in ("12", "day-0-head-0", "")] == [12, 0, 0]


def entry() -> ReplayEntry:
    known = torch.arange(5) >= 2
    teacher = Teacher(torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1))
    return ReplayEntry(sample=Sample("r", torch.arange(5), None, torch.zeros(5, 4), known, teacher), epochs=1)


def test_the_buffer_drops_its_oldest_samples_and_draws_none_beyond_its_epochs() -> None:
    buffer = ReplayBuffer[ReplayEntry](Train(replay_buffer_size=3, max_epochs=2), random.Random(0))
    entries = [entry() for _ in range(4)]
    for one in entries:
        buffer.add(one)
    assert {id(one) for one in buffer.draw(8)} == {id(one) for one in entries[1:]}
    assert buffer.drawable == 0
    assert buffer.draw(1) == []
