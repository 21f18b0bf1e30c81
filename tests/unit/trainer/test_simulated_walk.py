"""Verify steps are walked as a node runs them: over all parts of a request, and anew behind a gap."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from trainer.data.samples import Sample, Teacher
from trainer.objective.simulated_acceptance import (
    F64,
    SampleChains,
    SimulatedAcceptance,
    expect_starts,
    sum_acceptance,
    walk_requests,
)


def sample(request: str) -> Sample:
    """Return a sample of which the walk reads the request alone."""
    empty = torch.zeros(0, dtype=torch.int64)
    return Sample(request, empty, None, torch.zeros(0, 3), empty.bool(), Teacher(empty[:, None], torch.zeros(0, 1)))


def chains_of(position_R: Sequence[int], rate_RK: F64) -> SampleChains:
    """Return chains of which each token is accepted at a rate, given that the tokens before it are."""
    reach_RK = rate_RK.cumprod(axis=1)
    return SampleChains(np.array(position_R, np.int64), reach_RK, reach_RK.sum(axis=1))


def walk_backwards(chains: SampleChains) -> tuple[float, float]:
    """Return accepted tokens and verify steps from the first root on: of its step, and of what may follow it."""
    roots, longest = chains.reach_RK.shape
    tokens, steps = np.zeros(roots + longest + 1), np.zeros(roots + longest + 1)
    for root in reversed(range(roots)):
        tokens[root], steps[root] = chains.accepted_R[root], 1
        for accepted, (reached, further) in enumerate(pairwise([1, *chains.reach_RK[root], 0])):
            tokens[root] += (reached - further) * tokens[root + accepted + 1]
            steps[root] += (reached - further) * steps[root + accepted + 1]
    return tokens[0], steps[0]


rates = st.tuples(st.integers(1, 12), st.integers(1, 4)).flatmap(
    lambda shape: of_numpy.arrays(np.float64, shape, elements=st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
)


@given(rates, st.sets(st.integers(1, 11)), st.integers(0, 99), st.randoms())
def test_the_parts_of_a_request_are_walked_as_one_from_root_to_root(
    rate_RK: F64, cuts: set[int], position: int, random: object
) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(rate_RK)), len(rate_RK)]
    parts = [(sample("r"), chains_of(range(position + a, position + b), rate_RK[a:b])) for a, b in pairwise(edges)]
    other = (sample("other"), chains_of(range(position, position + len(rate_RK)), rate_RK[::-1]))
    order = [*parts, other]
    random.shuffle(order)  # type: ignore[attr-defined]
    found = dict(zip([one for one, _ in order], walk_requests(*zip(*order, strict=True)), strict=True))
    whole = chains_of(range(len(rate_RK)), rate_RK)
    assert sum_acceptance(found[part] for part, _ in parts) == pytest.approx(walk_backwards(whole))
    assert found[other[0]] == pytest.approx(walk_backwards(other[1]))


def test_a_verify_step_starts_at_a_root_as_often_as_in_drawn_walks() -> None:
    generator = np.random.default_rng(0)
    rate_RK = generator.random((9, 3))
    began_R, walks = np.zeros(9), 20_000
    for _ in range(walks):
        root = 0
        while root < 9:
            began_R[root] += 1
            is_right_K = generator.random(3) < rate_RK[root]
            root += 1 + int(np.logical_and.accumulate(is_right_K).sum())
    assert np.allclose(expect_starts(rate_RK.cumprod(axis=1)), began_R / walks, atol=0.015)


def test_a_chain_counts_only_where_a_verify_step_starts() -> None:
    after_a_hit, after_a_miss = [1.0, 1.0], [0.0, 0.0]
    chains = chains_of(
        range(6), np.array([after_a_miss, after_a_hit, after_a_hit, after_a_hit, after_a_miss, [1.0, 0]])
    )
    assert chains.accepted_R.mean() == 7 / 6, "over all positions"
    assert walk_requests([sample("r")], [chains]) == [SimulatedAcceptance(3, 4)], "steps at 0, 1, 4 and 5"


def test_the_walk_begins_anew_behind_missing_roots() -> None:
    always_RK = np.ones((2, 3))
    first, second = chains_of([4, 5], always_RK), chains_of([7, 8], always_RK)
    assert walk_requests([sample("r"), sample("r")], [first, second]) == [SimulatedAcceptance(3, 1)] * 2
    joined = chains_of([4, 5, 7, 8], np.ones((4, 3)))
    assert walk_requests([sample("r")], [joined]) == [SimulatedAcceptance(6, 2)], "rows without features lie between"
    follows = chains_of([6, 7], always_RK)
    assert walk_requests([sample("r"), sample("r")], [first, follows]) == [SimulatedAcceptance(3, 1), (0, 0)]
    assert walk_requests([sample("r"), sample("s")], [first, follows]) == [SimulatedAcceptance(3, 1)] * 2


def test_samples_without_a_root_have_no_verify_step() -> None:
    empty = chains_of([], np.zeros((0, 3)))
    assert walk_requests([], []) == []
    assert walk_requests([sample("r")], [empty]) == [SimulatedAcceptance(0, 0)]
    one = chains_of([4], np.zeros((1, 3)))
    assert walk_requests([sample("r"), sample("r")], [one, empty]) == [SimulatedAcceptance(0, 1), (0, 0)]
