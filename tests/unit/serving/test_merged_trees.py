"""Two drafts of a sequence become one tree: which nodes it has, and how likely they are."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.draft_tree import depths
from schemas.trace.record import ROOT, DraftSource
from serving.engines.builtin.drafter import EMPTY_TREE, DraftNode, DraftTree, merge_trees

SPECULATOR, SUFFIX = DraftSource.SPECULATOR, DraftSource.SUFFIX


def tree_of(*paths: tuple[int, ...], rates: dict[int, float], source: DraftSource) -> DraftTree:
    """A tree with the given paths of tokens, in which a token has its rate after its accepted parent."""
    nodes: list[DraftNode] = []
    index: dict[tuple[int, ...], int] = {(): ROOT}
    for path in paths:
        for length in range(1, len(path) + 1):
            prefix = path[:length]
            if prefix not in index:
                parent = index[prefix[:-1]]
                above = 1.0 if parent == ROOT else nodes[parent].chance
                rate = rates[prefix[-1]]
                nodes.append(DraftNode(prefix[-1], parent, length, math.log(rate), rate, above * rate, source))
                index[prefix] = len(nodes) - 1
    return DraftTree(tuple(nodes), version="7" if source is SPECULATOR else "")


def chances(tree: DraftTree) -> dict[tuple[int, ...], float]:
    paths: list[tuple[int, ...]] = []
    for node in tree.nodes:
        paths.append((*(() if node.parent == ROOT else paths[node.parent]), node.token))
    return {path: node.chance for path, node in zip(paths, tree.nodes, strict=True)}


def test_an_agreed_token_is_one_node_that_is_wrong_only_if_both_drafters_err() -> None:
    first = tree_of((1, 2), rates={1: 0.6, 2: 0.5}, source=SPECULATOR)
    second = tree_of((1, 3), rates={1: 0.5, 3: 0.4}, source=SUFFIX)
    merged = merge_trees(first, second)
    assert merged.tokens == [1, 2, 3]
    assert merged.parents == [ROOT, 0, 0]
    assert [node.source for node in merged.nodes] == [SPECULATOR | SUFFIX, SPECULATOR, SUFFIX]
    assert merged.version == "7"
    found = chances(merged)
    assert found[1,] == pytest.approx(1 - 0.4 * 0.5)
    assert found[1, 2] == pytest.approx(found[1,] * 0.5 * 0.6 / (1 - 0.5 * 0.4))
    assert found[1, 3] == pytest.approx(found[1,] * 0.4 * 0.5 / (1 - 0.5 * 0.4))


def test_a_draft_without_a_rival_keeps_its_chances() -> None:
    only = tree_of((1, 2), (3,), rates={1: 0.6, 2: 0.5, 3: 0.2}, source=SUFFIX)
    assert merge_trees(EMPTY_TREE, only) is only
    assert merge_trees(only, EMPTY_TREE) is only


paths = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), max_size=5)
rates = st.fixed_dictionaries({token: st.floats(0.01, 1.0) for token in range(3)})


@given(paths, rates, paths, rates)
def test_a_merged_tree_holds_every_path_of_both_drafts_once(
    first_paths: list[tuple[int, ...]],
    first_rates: dict[int, float],
    second_paths: list[tuple[int, ...]],
    second_rates: dict[int, float],
) -> None:
    first = tree_of(*first_paths, rates=first_rates, source=SPECULATOR)
    second = tree_of(*second_paths, rates=second_rates, source=SUFFIX)
    merged = merge_trees(first, second)
    found = chances(merged)
    assert len(found) == len(merged.nodes)
    assert set(found) == set(chances(first)) | set(chances(second))
    assert [node.depth for node in merged.nodes] == depths(merged.parents)
    for path, chance in found.items():
        assert 0 <= chance <= found.get(path[:-1], 1.0) + 1e-9, "a token is at most as likely as those before it"
    in_first, in_second = set(chances(first)), set(chances(second))
    for path, node in zip(found, merged.nodes, strict=True):
        expected = (SPECULATOR if path in in_first else DraftSource(0)) | (
            SUFFIX if path in in_second else DraftSource(0)
        )
        assert node.source == expected


@given(paths, rates, st.data())
def test_kept_nodes_form_the_same_tree_without_the_others(
    all_paths: list[tuple[int, ...]], all_rates: dict[int, float], data: st.DataObject
) -> None:
    tree = tree_of(*all_paths, rates=all_rates, source=SPECULATOR)
    wanted = data.draw(st.sets(st.sampled_from(range(len(tree.nodes)))) if tree.nodes else st.just(set()))
    kept = sorted(i for i in range(len(tree.nodes)) if any(i == w or i in ancestors(tree, w) for w in wanted))
    found = chances(tree.keep(kept))
    everything = list(chances(tree).items())
    assert list(found.items()) == [everything[i] for i in kept]
    assert tree.keep(kept).version == ("7" if kept else "")


def ancestors(tree: DraftTree, node: int) -> set[int]:
    """The nodes before a node."""
    found = set()
    while (node := tree.nodes[node].parent) != ROOT:
        found.add(node)
    return found
