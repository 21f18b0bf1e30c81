"""The noise is SplitMix64's, exponential and independent; the token that it chooses is a sample of the distribution."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest, pearsonr

from serving.engines.builtin.noise import _mix, choose_token, exponential_noise

GAMMA = 0x9E3779B97F4A7C15
MASK = 2**64 - 1


def split_mix(state: int) -> int:
    """The output function of SplitMix64 on integers of Python."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def plain_noise(seed: int, position: int, token: int) -> float:
    state = split_mix((split_mix(seed & MASK) + position * GAMMA) & MASK)
    number = split_mix((state + (token + 1) * GAMMA) & MASK)
    return -math.log(((number >> 12) + 0.5) / 2**52)


def test_the_numbers_are_those_of_splitmix64() -> None:
    """The first numbers of state 1234567 in other implementations."""
    states = np.array([(1234567 + n * GAMMA) & MASK for n in (1, 2, 3)], np.uint64)
    assert _mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(-(2**63), 2**64), st.integers(0, 2**40), st.lists(st.integers(0, 2**31), max_size=5))
def test_noise_is_a_function_of_seed_position_and_token(seed: int, position: int, tokens: list[int]) -> None:
    found = exponential_noise(seed, position, np.array(tokens, np.int64))
    assert found.tolist() == pytest.approx([plain_noise(seed, position, token) for token in tokens], rel=1e-14)
    assert (found > 0).all()


def test_noise_is_exponential_and_independent_between_seeds_positions_and_tokens() -> None:
    grid = np.array([[exponential_noise(seed, at, np.arange(40)) for at in range(40)] for seed in range(40)])
    assert kstest(grid.ravel(), "expon").pvalue > 1e-4
    for axis, shift in itertools.product(range(3), (1, 2, 7)):
        shifted = np.roll(grid, shift, axis)
        assert pearsonr(np.exp(-grid).ravel(), np.exp(-shifted).ravel()).pvalue > 1e-4, (axis, shift)


@pytest.mark.parametrize("seeds", [range(20_000), [0]], ids=["one position of many seeds", "many positions of a seed"])
def test_a_chosen_token_has_the_distribution(seeds: range | list[int]) -> None:
    """Chi-square over eight tokens with 20,000 draws."""
    probs_V = torch.tensor([0.3, 0.0, 0.2, 0.001, 0.199, 0.1, 0.15, 0.05])
    chosen = [choose_token(probs_V, seed, at) for seed in seeds for at in range(20_000 // len(seeds))]
    counts = np.bincount(chosen, minlength=8)
    kept = probs_V.numpy() > 0
    assert counts[~kept].sum() == 0
    wanted = probs_V.double().numpy()[kept] / probs_V.double().sum().item()
    assert chisquare(counts[kept], wanted * len(chosen)).pvalue > 1e-4


def test_similar_distributions_choose_the_same_token_more_often_than_two_draws_would() -> None:
    """The chance that both choose x is 1 / sum_v max(p_v / p_x, q_v / q_x) (Daliri et al., arXiv 2408.07978)."""
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.4, 0.2, 0.3, 0.1])
    same = sum(choose_token(p, seed, 3) == choose_token(q, seed, 3) for seed in range(5000))
    expected = sum(float(1 / torch.maximum(p / p[x], q / q[x]).sum()) for x in range(4))
    assert abs(same - 5000 * expected) < 4 * math.sqrt(5000 * expected * (1 - expected))
    assert expected > 1.5 * float(p @ q)


@pytest.mark.parametrize("probs", [[0.5, math.nan, 0.5], [math.nan] * 3, [0.0, 0.0]])
def test_probabilities_that_are_not_finite_raise_an_error(probs: list[float]) -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        choose_token(torch.tensor(probs), 1, 2)
