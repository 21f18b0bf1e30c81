"""Forwards over a ragged batch as CUDA graphs.

A forward over few tokens runs hundreds of small kernels, and a GPU's host takes longer to launch them one by one than
the GPU takes to compute them. A graph launches all of them at once, but only over tensors with the addresses and sizes
they had at capture. So the batch is padded: the slots of the cache up to the last one in use, the same number of tokens
in each, over a prefix of the cache up to the last entry in use. All three sizes are rounded up, and a graph is captured
when its sizes first occur. Results at padding are ignored.

Shape suffixes as in ``serving.engines.builtin.kv_cache``; W tokens of a slot, T = S * W tokens of the padded batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import structlog
import torch
from torch import Tensor
from torch.nn import functional as F

from serving.engines.builtin.kv_cache import KVCache, RaggedBatch, token_positions, visible_entries

log = structlog.get_logger()

MAX_WIDTH = 128
"""Maximum number of tokens of one slot in a graph; a wider batch runs kernel by kernel."""

_MIN_ENTRIES = 256
"""Entries of the shortest prefix."""

Forward = Callable[[Sequence[Tensor], "PaddedBatch"], Sequence[Tensor]]
"""From inputs [T, ..] to outputs [T, ..]."""


class GraphSize(NamedTuple):
    """The sizes a graph is captured for."""

    slots: int
    width: int
    entries: int


class PaddedBatch:
    """The same number of tokens in each of the first slots, over a prefix of their entries, in tensors that stay."""

    def __init__(self, size: GraphSize, device: torch.device) -> None:
        tokens = size.slots * size.width
        self.size = size
        self.slots_T = torch.arange(size.slots, device=device).repeat_interleave(size.width)
        self._where_2T = torch.zeros(2, tokens, dtype=torch.int64, device=device)
        self.positions_T, self.entries_T = self._where_2T.unbind()
        self._sees_SWP = torch.zeros(*size, dtype=torch.bool, device=device)
        self._mask: dict[int, Tensor] = {}

    def load(self, batch: RaggedBatch, spare_entry: int) -> list[int]:
        """Load the layout of a ragged batch; each segment goes to the first rows of its slot.

        Args:
            batch: At most one segment per slot.
            spare_entry: Entry that no sequence uses; padding writes there.

        Returns:
            The row of each token of the batch.
        """
        slots, width, entries = self.size
        where_2T = np.zeros((2, slots * width), np.int64)
        where_2T[1] = spare_entry
        sees_SWP = np.zeros((slots, width, entries), np.bool_)
        sees_SWP[:, :, 0] = True
        rows: list[int] = []
        for segment in batch.segments:
            first = segment.slot * width
            end = first + segment.length
            where_2T[0, first:end] = token_positions(segment)
            where_2T[1, first:end] = range(segment.start, segment.start + segment.length)
            sees = visible_entries(segment)
            sees_SWP[segment.slot, : segment.length, : sees.shape[1]] = sees
            rows.extend(range(first, end))
        self._where_2T.copy_(torch.from_numpy(where_2T))
        self._sees_SWP.copy_(torch.from_numpy(sees_SWP))
        self.clear_mask()
        return rows

    def attend(self, layer: int, keys_LSMPE: Tensor, values_LSMPE: Tensor, q_TNE: Tensor) -> Tensor:
        """Attend over the prefix of all slots at once, query heads folded as in ``RaggedBatch``."""
        slots, width, entries = self.size
        _, heads, head_size = q_TNE.shape
        kv_heads = keys_LSMPE.shape[2]
        groups = heads // kv_heads
        q_SMQE = q_TNE.view(slots, width, kv_heads, groups, head_size).permute(0, 2, 3, 1, 4).flatten(2, 3)
        keys_SMPE, values_SMPE = (x[layer, :slots, :, :entries] for x in (keys_LSMPE, values_LSMPE))
        if groups not in self._mask:
            blank = torch.zeros(self._sees_SWP.shape, device=q_TNE.device)
            mask_SWP = blank.masked_fill_(~self._sees_SWP, float("-inf"))
            self._mask[groups] = mask_SWP.repeat(1, groups, 1)[:, None]
        out_SMQE = F.scaled_dot_product_attention(q_SMQE, keys_SMPE, values_SMPE, attn_mask=self._mask[groups])
        by_group = out_SMQE.view(slots, kv_heads, groups, width, head_size)
        return by_group.permute(0, 3, 1, 2, 4).reshape(slots * width, heads, head_size)

    def clear_mask(self) -> None:
        """Discard the mask; the first layer that attends computes it from the current layout."""
        self._mask.clear()


class CudaGraphRunner:
    """Runs one kind of forward over one cache, captured once per size."""

    def __init__(self, forward: Forward, cache: KVCache) -> None:
        """Set the forward; capture nothing yet.

        Args:
            forward: Computes output rows from input rows. Rows may influence each other only through the cache, and
                nothing may wait for the GPU.
            cache: The cache it writes to and attends over.
        """
        self._forward, self._cache = forward, cache
        self._graphs: dict[GraphSize, _CapturedGraph] = {}
        self._pool: Any = None

    def run(self, batch: RaggedBatch, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Run the forward over a ragged batch; return None if the batch is too wide.

        Args:
            batch: At most one segment per slot.
            inputs: [T, ..] each, in the order of the batch's tokens.

        Returns:
            [T, ..] each, in that order.
        """
        size = fit_graph_size(batch, self._cache)
        if size.width > MAX_WIDTH:
            return None
        graph = self._graphs.get(size)
        if graph is None:
            graph = self._graphs[size] = _CapturedGraph(size, inputs)
            graph.batch.load(batch, self._cache.positions - 1)
            self._pool = graph.capture(self._forward, self._pool)
            log.info("cuda_graph_captured", **size._asdict(), captured=len(self._graphs))
        return graph.replay(batch, self._cache.positions - 1, inputs)


class _CapturedGraph:
    """A CUDA graph with its tensors."""

    def __init__(self, size: GraphSize, inputs: Sequence[Tensor]) -> None:
        self._device = inputs[0].device
        self.batch = PaddedBatch(size, self._device)
        tokens = size.slots * size.width
        self._inputs = [x.new_zeros(tokens, *x.shape[1:]) for x in inputs]
        self._outputs: Sequence[Tensor] = ()
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, forward: Forward, pool: Any) -> Any:
        """Warm up with one run, because libraries initialize at their first call; capture; return the memory pool."""
        warm_up = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        warm_up.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(warm_up):
            forward(self._inputs, self.batch)
        torch.cuda.current_stream(self._device).wait_stream(warm_up)
        self.batch.clear_mask()
        # Other threads use the GPU meanwhile: the version poller checks a draft there.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = forward(self._inputs, self.batch)
        return self._graph.pool()

    def replay(self, batch: RaggedBatch, spare_entry: int, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Copy the inputs in, launch the graph, copy the outputs out."""
        rows_T = torch.tensor(self.batch.load(batch, spare_entry), device=self._device)
        for own, given in zip(self._inputs, inputs, strict=True):
            own[rows_T] = given
        self._graph.replay()
        return tuple(own[rows_T] for own in self._outputs)


def fit_graph_size(batch: RaggedBatch, cache: KVCache) -> GraphSize:
    """Return the sizes of the graph for a batch: powers of two, and no more slots and entries than the cache has."""
    slots = 1 + max(segment.slot for segment in batch.segments)
    width = max(segment.length for segment in batch.segments)
    entries = max(segment.start + segment.length for segment in batch.segments)
    entries = min(max(_next_power_of_two(entries), _MIN_ENTRIES), cache.positions)
    return GraphSize(min(_next_power_of_two(slots), cache.slots), _next_power_of_two(width), entries)


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
