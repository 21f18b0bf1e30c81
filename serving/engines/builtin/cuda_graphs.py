"""Passes over a ragged batch as CUDA graphs.

A pass over few tokens is hundreds of small kernels, and launching them one by one takes a GPU's host longer than the
GPU computes. A graph launches them all at once, but only over tensors that lie where they lay when it was captured, and
of the same sizes. So a batch is laid out anew: the first slots of the cache, as many as reach the last one in use, with
the same number of tokens each, over a prefix of the cache that reaches the last entry in use. All three sizes are
rounded up, and a graph is captured when its sizes first come up. What stands where no token is, is computed and left.

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

from serving.engines.builtin.kv_cache import RaggedBatch, SlotCache, positions_of, seen_by

log = structlog.get_logger()

WIDEST = 128
"""Tokens of one slot that a captured pass takes at most; a wider batch runs kernel by kernel."""

_SHORTEST = 256
"""Entries of the shortest prefix."""

Pass = Callable[[Sequence[Tensor], "PaddedBatch"], Sequence[Tensor]]
"""From inputs [T, ..] to outputs [T, ..]."""


class Sizes(NamedTuple):
    """What a graph is captured for."""

    slots: int
    width: int
    entries: int


class PaddedBatch:
    """As many tokens in each of the first slots, over a prefix of their entries; all of it in tensors that stay."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        tokens = sizes.slots * sizes.width
        self.sizes = sizes
        self.slots_T = torch.arange(sizes.slots, device=device).repeat_interleave(sizes.width)
        self._where_2T = torch.zeros(2, tokens, dtype=torch.int64, device=device)
        self.positions_T, self.entries_T = self._where_2T.unbind()
        self._seen_SWP = torch.zeros(*sizes, dtype=torch.bool, device=device)
        self._mask: dict[int, Tensor] = {}

    def lay_out(self, batch: RaggedBatch, spare: int) -> list[int]:
        """Take the tokens of a ragged batch, each segment at the beginning of its slot's.

        Args:
            batch: At most one segment a slot.
            spare: Entry that no request uses: what padding computes goes there.

        Returns:
            Where each token of the batch stands.
        """
        slots, width, entries = self.sizes
        where_2T = np.zeros((2, slots * width), np.int64)
        where_2T[1] = spare
        seen_SWP = np.zeros((slots, width, entries), np.bool_)
        seen_SWP[:, :, 0] = True
        places: list[int] = []
        for segment in batch.segments:
            first = segment.slot * width
            end = first + segment.length
            where_2T[0, first:end] = positions_of(segment)
            where_2T[1, first:end] = range(segment.start, segment.start + segment.length)
            seen = seen_by(segment)
            seen_SWP[segment.slot, : segment.length, : seen.shape[1]] = seen
            places.extend(range(first, end))
        self._where_2T.copy_(torch.from_numpy(where_2T))
        self._seen_SWP.copy_(torch.from_numpy(seen_SWP))
        self.renew()
        return places

    def attend(self, layer: int, keys_LSMPE: Tensor, values_LSMPE: Tensor, q_TNE: Tensor) -> Tensor:
        """Attend over the prefix of all slots at once, query heads folded as in ``RaggedBatch``."""
        slots, width, entries = self.sizes
        _, heads, size = q_TNE.shape
        kv_heads = keys_LSMPE.shape[2]
        groups = heads // kv_heads
        q_SMQE = q_TNE.view(slots, width, kv_heads, groups, size).permute(0, 2, 3, 1, 4).flatten(2, 3)
        keys_SMPE, values_SMPE = (x[layer, :slots, :, :entries] for x in (keys_LSMPE, values_LSMPE))
        if groups not in self._mask:
            blank = torch.zeros(self._seen_SWP.shape, device=q_TNE.device)
            mask_SWP = blank.masked_fill_(~self._seen_SWP, float("-inf"))
            self._mask[groups] = mask_SWP.repeat(1, groups, 1)[:, None]
        out_SMQE = F.scaled_dot_product_attention(q_SMQE, keys_SMPE, values_SMPE, attn_mask=self._mask[groups])
        by_group = out_SMQE.view(slots, kv_heads, groups, width, size)
        return by_group.permute(0, 3, 1, 2, 4).reshape(slots * width, heads, size)

    def renew(self) -> None:
        """Compute the mask again from what is seen now; the first layer that attends does."""
        self._mask.clear()


class CapturedPasses:
    """One kind of pass over one cache, captured once for each sizes that come up."""

    def __init__(self, run: Pass, cache: SlotCache) -> None:
        """Name the pass; nothing is captured yet.

        Args:
            run: Computes rows from rows: of each row only through the cache from others, and with nothing that waits
                for the GPU.
            cache: What it writes to and attends over.
        """
        self._run, self._cache = run, cache
        self._captured: dict[Sizes, _Captured] = {}
        self._pool: Any = None

    def run(self, batch: RaggedBatch, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The pass over a ragged batch, or None for one that is too wide.

        Args:
            batch: At most one segment a slot.
            inputs: [T, ..] each, in the order of the batch's tokens.

        Returns:
            [T, ..] each, in that order.
        """
        sizes = sizes_of(batch, self._cache)
        if sizes.width > WIDEST:
            return None
        captured = self._captured.get(sizes)
        if captured is None:
            captured = self._captured[sizes] = _Captured(sizes, inputs)
            captured.batch.lay_out(batch, self._cache.positions - 1)
            self._pool = captured.capture(self._run, self._pool)
            log.info("pass_captured", **sizes._asdict(), captured=len(self._captured))
        return captured.replay(batch, self._cache.positions - 1, inputs)


class _Captured:
    """A graph with its tensors."""

    def __init__(self, sizes: Sizes, inputs: Sequence[Tensor]) -> None:
        self._device = inputs[0].device
        self.batch = PaddedBatch(sizes, self._device)
        tokens = sizes.slots * sizes.width
        self._inputs = [x.new_zeros(tokens, *x.shape[1:]) for x in inputs]
        self._outputs: Sequence[Tensor] = ()
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Pass, pool: Any) -> Any:
        """Run once for what libraries set up at their first call, then capture; gives the graph's memory pool."""
        beside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(beside):
            run(self._inputs, self.batch)
        torch.cuda.current_stream(self._device).wait_stream(beside)
        self.batch.renew()
        # Other threads go on meanwhile: a puller checks a draft on the same GPU.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = run(self._inputs, self.batch)
        return self._graph.pool()

    def replay(self, batch: RaggedBatch, spare: int, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Copy in, launch, copy out."""
        places_T = torch.tensor(self.batch.lay_out(batch, spare), device=self._device)
        for own, given in zip(self._inputs, inputs, strict=True):
            own[places_T] = given
        self._graph.replay()
        return tuple(own[places_T] for own in self._outputs)


def sizes_of(batch: RaggedBatch, cache: SlotCache) -> Sizes:
    """The sizes of the graph for a batch: powers of two, and of the entries no more than there are."""
    slots = 1 + max(segment.slot for segment in batch.segments)
    width = max(segment.length for segment in batch.segments)
    entries = max(segment.start + segment.length for segment in batch.segments)
    return Sizes(min(_power(slots), cache.slots), _power(width), min(max(_power(entries), _SHORTEST), cache.positions))


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
