"""Draft trees: depths, attention mask and rejected branches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.draft_tree import attention_mask, chain, depths, is_chain, rejected_branches

TREES = st.integers(0, 8).flatmap(lambda m: st.tuples(*(st.integers(-1, i - 1) for i in range(m))))


def path(parents: tuple[int, ...], node: int) -> tuple[int, ...]:
    return (*path(parents, parents[node]), node) if node >= 0 else ()


@settings(deadline=None)
@given(TREES)
def test_a_node_attends_to_its_path_only(parents: tuple[int, ...]) -> None:
    seen = attention_mask(parents)
    assert seen.shape == (len(parents), len(parents))
    assert [tuple(np.flatnonzero(row)) for row in seen] == [path(parents, node) for node in range(len(parents))]


@settings(deadline=None)
@given(TREES)
def test_the_depth_of_a_node_is_the_length_of_its_path(parents: tuple[int, ...]) -> None:
    assert depths(parents) == [len(path(parents, node)) for node in range(len(parents))]


@settings(deadline=None)
@given(TREES)
def test_a_chain_is_the_tree_whose_last_node_attends_to_all_nodes(parents: tuple[int, ...]) -> None:
    assert is_chain(parents) == (depths(parents) == list(range(1, len(parents) + 1)))
    assert is_chain(parents) == (not parents or bool(attention_mask(parents)[-1].all()))


def test_the_parents_of_a_chain() -> None:
    assert [chain(m) for m in range(4)] == [(), (-1,), (-1, 0), (-1, 0, 1)]
    assert is_chain([-1, 0, 1])
    assert not is_chain([-1, -1])
    assert np.array_equal(attention_mask(chain(4)), np.tri(4, dtype=bool))


@settings(deadline=None)
@given(TREES, st.integers(0, 99))
def test_rejected_branches_are_the_paths_to_leaves_off_the_accepted_path(parents: tuple[int, ...], pick: int) -> None:
    accepted = path(parents, pick % (len(parents) + 1) - 1)
    leaves = [node for node in range(len(parents)) if node not in parents]
    assert rejected_branches(parents, accepted) == [path(parents, leaf) for leaf in leaves if leaf not in accepted]


@pytest.mark.parametrize(
    ("accepted", "branches"), [([], [(0, 1, 2)]), ([0], [(0, 1, 2)]), ([0, 1], [(0, 1, 2)]), ([0, 1, 2], [])]
)
def test_a_chain_has_one_rejected_branch_or_none(accepted: list[int], branches: list[tuple[int, ...]]) -> None:
    assert rejected_branches([-1, 0, 1], accepted) == branches
