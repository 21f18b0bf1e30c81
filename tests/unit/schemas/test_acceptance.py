"""The acceptance rule and the sampling distributions against their definitions.

Trees with branches are in ``test_acceptance_trees``, the noise in ``test_noise``.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.draft_tree import chain
from schemas.speculator.acceptance import accept, sampling_probs


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=5).flatmap(lambda d: st.tuples(st.just(d), _choices(len(d) + 1))))
def test_the_longest_prefix_that_the_target_would_choose_is_accepted(case: tuple[list[int], list[int]]) -> None:
    draft, choices = case
    verdict = accept(draft, chain(len(draft)), choices)
    right = [draft[:n] == choices[:n] for n in range(len(draft) + 1)]
    kept = len(verdict.path)
    assert kept == max(n for n, whole in enumerate(right) if whole)
    assert [*draft[:kept], verdict.bonus] == choices[: kept + 1]


def _choices(n: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 2), min_size=n, max_size=n)


def by_definition(full: list[float], top_p: float, top_k: int, min_p: float) -> list[float]:
    """Min-p, then top-k, then top-p over the remaining tokens, token by token; ties with the last kept token stay."""
    left = [p for p in full if p >= min_p * max(full)]
    left = [p for p in left if top_k == 0 or sum(other > p for other in left) < top_k]
    total = sum(sorted(left, reverse=True))
    mass, least = 0.0, 0.0
    for least in sorted(left, reverse=True):
        mass += least
        if top_p < 1 and mass >= top_p * total:
            break
    share = math.fsum(p for p in full if p >= least)
    return [p / share if p >= least else 0.0 for p in full]


TIED = st.lists(st.sampled_from([-3.0, 0.0, 0.5, 1.0]), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(st.lists(st.floats(-8, 8), min_size=1, max_size=12), TIED),
    st.floats(0.05, 5.0),
    st.one_of(st.floats(0.01, 1.0), st.sampled_from([0.25, 0.5, 0.75])),
    st.integers(0, 13),
    st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
)
def test_sampling_applies_temperature_then_min_p_then_top_k_then_top_p(
    logits: list[float], temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    found = sampling_probs(torch.tensor([logits]), temperature, top_p, top_k, min_p)[0]
    full = torch.softmax(torch.tensor([logits]) / temperature, -1)[0].tolist()
    wanted = by_definition(full, top_p, top_k, min_p)
    assert [p > 0 for p in found.tolist()] == [p > 0 for p in wanted]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45, 5e-324])
def test_tiny_temperatures_choose_the_likeliest_token(temperature: float) -> None:
    found = sampling_probs(torch.tensor([[-1e4, 3.0, 60000.0, 59999.0]]), temperature, 0.9, 3)
    assert found.tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 0, [0, 1, 2, 3, 4]),
        (0.5, 0, [0, 1, 2]),  # the third as likely as the second
        (0.39, 0, [0]),
        (1.0, 1, [0]),
        (1.0, 2, [0, 1, 2]),  # the third as likely as the second
        (1.0, 4, [0, 1, 2, 3]),
        (0.5, 1, [0]),
        (0.85, 4, [0, 1, 2]),
        (0.41, 0, [0, 1, 2]),
        (0.42, 3, [0]),  # 0.4 is half of what top-k left
        (1.0, 9, [0, 1, 2, 3, 4]),
    ],
)
def test_the_limits_of_top_k_and_top_p(top_p: float, top_k: int, kept: list[int]) -> None:
    full = torch.tensor([[0.4, 0.2, 0.2, 0.125, 0.075]])
    found = sampling_probs(full.log(), 1.0, top_p, top_k)
    assert found[0].nonzero().flatten().tolist() == kept
    torch.testing.assert_close(found[0, kept], full[0, kept] / full[0, kept].sum())
