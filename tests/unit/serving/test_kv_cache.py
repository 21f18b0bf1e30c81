"""Attention over the KV cache equals plain attention of each token, whatever attends together and whatever is stale."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from schemas.draft_tree import attention_mask
from serving.engines.builtin.kv_cache import MAX_PADDING, KVCache, RaggedBatch, Segment, TreeLayout, join_segments

SLOTS, KV_HEADS, HEADS, SIZE, POSITIONS = 7, 2, 6, 8, 420


def attend_plainly(cache: KVCache, segment: Segment, q_WNE: Tensor) -> Tensor:
    """Return [W, N, E]: softmax over the visible entries, token by token and head by head."""
    end = segment.start + segment.length
    keys_MPE, values_MPE = cache._keys[0, segment.slot, :, :end], cache._values[0, segment.slot, :, :end]
    out_WNE = torch.empty_like(q_WNE)
    for token in range(segment.length):
        visible = list(range(segment.start + token + 1))
        if segment.tree is not None:
            first = segment.tree.first_entry
            visible = [entry for entry in range(end) if entry < first or segment.tree.sees[token, entry - first]]
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            scores = keys_MPE[shared, visible] @ q_WNE[token, head] / SIZE**0.5
            out_WNE[token, head] = scores.softmax(0) @ values_MPE[shared, visible]
    return out_WNE


@st.composite
def draw_segments(draw: st.DrawFn) -> list[Segment]:
    """Chains, trees and pieces of prompts in some slots, in ascending order or in any."""
    slots = draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, unique=True))
    if draw(st.booleans()):
        slots.sort()
    return [Segment(slot, *draw(draw_place())) for slot in slots]


@st.composite
def draw_place(draw: st.DrawFn) -> tuple[int, int, TreeLayout | None]:
    """Start and length of a segment, and its layout if it is a tree."""
    start = draw(st.one_of(st.integers(100, 130), st.integers(4, 400)))
    length = draw(st.sampled_from([1, 1, 2, 4, 9]))
    if draw(st.booleans()):
        return start, length, None
    before = draw(st.integers(0, 3))
    sees = np.zeros((length, before + length), np.bool_)
    sees[:, :before] = draw(st.lists(st.booleans(), min_size=before, max_size=before))
    sees[:, before:] = attention_mask([draw(st.integers(-1, node - 1)) for node in range(length)])
    return start, length, TreeLayout(start - before, sees, tuple(range(length)))


@settings(max_examples=150, deadline=None)
@given(batch=draw_segments(), seed=st.integers(0, 2**16))
@torch.inference_mode()
def test_attention_of_a_batch_equals_plain_attention_of_each_token(batch: list[Segment], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(1, SLOTS, KV_HEADS, POSITIONS, SIZE)
    for stale in (cache._keys, cache._values):
        stale.copy_(1e4 * torch.randn(stale.shape, generator=generator))
    for segment in batch:
        for cached in (cache._keys, cache._values):
            shape = (1, KV_HEADS, segment.start, SIZE)
            cached[:, segment.slot, :, : segment.start] = torch.randn(shape, generator=generator)
    tokens = sum(segment.length for segment in batch)
    q_TNE, k_TME, v_TME = (
        torch.randn(tokens, heads, SIZE, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    found = cache.attend(0, RaggedBatch(batch), q_TNE, k_TME, v_TME)
    queries = q_TNE.split_with_sizes([segment.length for segment in batch])
    expected = [attend_plainly(cache, segment, q_WNE) for segment, q_WNE in zip(batch, queries, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


@given(draw_segments())
def test_segments_attend_together_only_with_equal_lengths_similar_ends_and_slots_at_equal_steps(
    batch: list[Segment],
) -> None:
    groups = list(join_segments(batch))
    assert list(chain.from_iterable(groups)) == batch
    for group in groups:
        assert len({segment.length for segment in group}) == 1
        slots = [segment.slot for segment in group]
        assert slots == list(range(SLOTS))[slots[0] : slots[-1] + 1 : slots[1] - slots[0] if len(slots) > 1 else 1]
        starts = [segment.start for segment in group]
        assert max(starts) - min(starts) <= MAX_PADDING


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        ([Segment(slot, 100, 1) for slot in range(5)], [5]),
        ([Segment(slot, 100 + 15 * slot, 4) for slot in range(5)], [5]),
        ([Segment(0, 100, 1), Segment(1, 100 + MAX_PADDING, 1), Segment(2, 101 + MAX_PADDING, 1)], [2, 1]),
        ([Segment(0, 100, 1), Segment(2, 100, 1), Segment(3, 100, 1), Segment(4, 100, 2)], [2, 1, 1]),
        ([Segment(1, 100, 3), Segment(3, 120, 3), Segment(5, 140, 3)], [3]),
        ([Segment(2, 100, 1), Segment(1, 100, 1)], [1, 1]),
    ],
)
def test_segments_with_similar_ends_attend_in_one_call(batch: list[Segment], sizes: list[int]) -> None:
    assert [len(group) for group in join_segments(batch)] == sizes


def test_cleared_entries_of_a_cache_are_zero() -> None:
    cache = KVCache(2, 3, 1, 6, 2)
    for values in (cache._keys, cache._values):
        values.fill_(float("nan"))
    cache.clear(0, slice(2, 4))
    cache.clear(1)
    for values in (cache._keys, cache._values):
        assert values[:, 0, :, 2:4].eq(0).all()
        assert values[:, 1].eq(0).all()
        assert values[:, 0, :, [0, 1, 4, 5]].isnan().all()
        assert values[:, 2].isnan().all()
