"""The hybrid drafter selects nodes over all sequences, and compares proposals with the output."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.trace.record import ROOT, DraftSource
from serving.answers.scoped_corpus import ScopedCorpus
from serving.engines.base import Request
from serving.engines.builtin.drafter import DraftNode, DraftTree
from serving.engines.builtin.hybrid_drafter import HybridDrafter, list_outcomes
from serving.engines.builtin.sequence import Sequence
from serving.engines.builtin.suffix_drafter import SuffixDrafter
from serving.planner.latency_model import ForwardTiming, LatencyCurve, LatencyModel
from serving.planner.planner import Planner

NODES = 4


def drafter_for(row_ms: float) -> HybridDrafter:
    """A drafter without a speculator on a machine with the given price of a row."""
    rows = LatencyCurve({1: 0.02, 101: 0.02 + row_ms / 10})
    planner = Planner(LatencyModel(rows, *[LatencyCurve({1: 0.0})] * 3), max_depth=3)
    suffix = SuffixDrafter(ScopedCorpus("request", 1 << 20, 1e9))
    return HybridDrafter(planner, None, suffix, max_suffix_depth=8, max_nodes=NODES)


def sequence(tokens: list[int], slot: int, room: int = 20) -> Sequence:
    return Sequence(Request("r", tuple(tokens[:1]), 100), lambda _: None, len(tokens) + room, 0, tokens, slot)


def test_likely_tokens_of_one_sequence_displace_unlikely_ones_of_another() -> None:
    drafter = drafter_for(row_ms=5.0)
    for _ in range(30):  # two tokens before a draft are a poor match, seven a good one
        drafts = drafter.draft([sequence([9, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7], 0)], 1)
        drafter.observe(drafts, {0: [8, 1, 2, 3, 4, 5]}, None)
        drafts = drafter.draft([sequence([9, 6, 7, 2, 6, 7], 0)], 1)
        drafter.observe(drafts, {0: [5]}, None)
    good, poor = sequence([9, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7], 0), sequence([9, 6, 7, 2, 6, 7], 1)
    trees = drafter.draft([good, poor], 2).trees
    assert trees[0].tokens == [8, 1, 2, 3], "at most as many nodes as a sequence may have"
    assert 1 not in trees, "nothing of the poor match is worth a row"


def test_expensive_rows_leave_a_draft_unverified_but_not_unmeasured() -> None:
    drafter = drafter_for(row_ms=40.0)
    seq = sequence([9, 6, 7, 2, 6, 7], 0)
    before = drafter._planner.suffix[True].estimate(0.5, 2)
    drafts = drafter.draft([seq], 1)
    assert drafts.trees == {}
    drafter.observe(drafts, {0: [2]}, ForwardTiming(1, 1, 0.02))
    assert drafter._planner.suffix[True].estimate(0.5, 2) > before


def test_a_merged_draft_has_at_most_as_many_nodes_as_a_sequence_may_have() -> None:
    nodes = tuple(DraftNode(i, i - 1, i + 1, -0.1, 0.9, 0.9 ** (i + 1)) for i in range(NODES + 3))
    [kept] = drafter_for(row_ms=0.01)._select([DraftTree(nodes)], 1)
    assert kept.tokens == list(range(NODES))


nodes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)), max_size=8)


@given(nodes, st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_outcomes_follow_the_output_through_a_tree(shape: list[tuple[int, int]], output: list[int]) -> None:
    """Reference: walk down from the root one output token at a time."""
    taken: set[tuple[int, int]] = set()
    drafted: list[DraftNode] = []
    for token, back in shape:
        parent = ROOT if back >= len(drafted) else len(drafted) - 1 - back
        if (parent, token) not in taken:
            taken.add((parent, token))
            depth = 1 if parent == ROOT else drafted[parent].depth + 1
            drafted.append(DraftNode(token, parent, depth, math.log(0.5), 0.5, 0.5**depth, DraftSource.SUFFIX, depth))
    outcomes = list(list_outcomes(DraftTree(tuple(drafted)), output, greedy=True))
    expected, parent = [], ROOT
    for token in output:
        siblings = [i for i, node in enumerate(drafted) if node.parent == parent]
        if not siblings:
            break
        right = [i for i in siblings if drafted[i].token == token]
        expected.append((len(siblings), siblings.index(right[0]) if right else None))
        if not right:
            break
        parent = right[0]
    assert [(len(outcome.siblings), outcome.accepted) for outcome in outcomes] == expected
    assert all(outcome.source is DraftSource.SUFFIX for outcome in outcomes)


def test_room_for_one_token_after_the_bonus_token_bounds_a_suffix_draft() -> None:
    trees = drafter_for(row_ms=0.01).draft([sequence([5, 6, 7, 8, 5, 6], 0, room=2)], 1).trees
    assert trees[0].tokens == pytest.approx([7])
