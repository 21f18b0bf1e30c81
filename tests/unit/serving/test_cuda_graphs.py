"""A padded batch for CUDA graphs gives the same results as the ragged batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_target import VOCABULARY, write_tiny_target
from transformers import LlamaForCausalLM

from serving.engines.builtin.cuda_graphs import GraphSize, PaddedBatch, fit_graph_size
from serving.engines.builtin.decoder import FusedDecoder
from serving.engines.builtin.kv_cache import KVCache, RaggedBatch, Segment, TreeLayout

SLOTS, POSITIONS, LAYERS = 3, 300, 8
TREE = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], np.bool_)
"""A root, two children, and a child of the first."""


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> FusedDecoder:
    model = LlamaForCausalLM.from_pretrained(write_tiny_target(tmp_path_factory.mktemp("tiny")), dtype=torch.float32)
    return FusedDecoder(model.requires_grad_(requires_grad=False), "float32", (1, 3, 6), POSITIONS)


def filled() -> KVCache:
    """A cache with every entry written, because padding attends to arbitrary entries."""
    cache = KVCache(LAYERS, SLOTS, 2, POSITIONS, 8)
    generator = torch.Generator().manual_seed(1)
    for stored in (cache._keys, cache._values):
        stored.copy_(torch.randn(stored.shape, generator=generator))
    return cache


@given(
    lengths=st.lists(st.integers(0, 6), min_size=SLOTS, max_size=SLOTS).filter(any),
    starts=st.lists(st.integers(0, 280), min_size=SLOTS, max_size=SLOTS),
    tree=st.booleans(),
    order=st.permutations(range(SLOTS)),
)
@settings(max_examples=40, deadline=None)
def test_a_forward_over_the_padded_batch_equals_the_ragged_one(
    decoder: FusedDecoder, lengths: list[int], starts: list[int], tree: bool, order: list[int]
) -> None:
    segments = [Segment(slot, starts[slot], lengths[slot]) for slot in order if lengths[slot]]
    if tree:
        start = segments[0].start
        segments[0] = Segment(
            segments[0].slot, start, 4, TreeLayout(start, TREE, (start, start + 1, start + 1, start + 2))
        )
    ragged = RaggedBatch(segments)
    tokens_T = torch.arange(len(ragged.slots_T)) % VOCABULARY
    cache, other = filled(), filled()
    expected = decoder(tokens_T, ragged, cache)

    padded = PaddedBatch(fit_graph_size(ragged, other), torch.device("cpu"))
    rows = padded.load(ragged, POSITIONS - 1)
    padded_T = torch.zeros(padded.size.slots * padded.size.width, dtype=torch.int64)
    padded_T[rows] = tokens_T
    found = decoder(padded_T, padded, other)
    torch.testing.assert_close(found.last_TH[rows], expected.last_TH, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.features_TF[rows], expected.features_TF, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(found.last_TH).all()
    torch.testing.assert_close(other._keys[..., :-1, :], cache._keys[..., :-1, :], rtol=1e-3, atol=1e-3)


def test_graph_sizes_are_powers_of_two_within_the_cache() -> None:
    cache = KVCache(1, 6, 2, POSITIONS, 8)
    assert fit_graph_size(RaggedBatch([Segment(0, 0, 1)]), cache) == GraphSize(1, 1, 256)
    assert fit_graph_size(RaggedBatch([Segment(2, 9, 3), Segment(0, 4, 5)]), cache) == GraphSize(4, 8, 256)
    assert fit_graph_size(RaggedBatch([Segment(5, 255, 2)]), cache) == GraphSize(6, 2, POSITIONS)
