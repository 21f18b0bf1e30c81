"""Keys and values of running requests, one slot a request, and attention over a ragged batch of them.

A forward pass runs over the tokens of all requests laid end to end, without padding. A ``Segment`` says which of them
belong to which slot and where they begin in it. Tokens that verification rejected leave stale entries behind; the next
segment of the slot begins at the last committed token and overwrites them.

The tokens of a tree lie in their slot one after the other, whatever their depth: the mask follows the parent links, and
the entries of the path that was accepted are moved together afterwards.

Shape suffixes: L layers, S slots, M key/value heads, P positions, E head size, N query heads, T tokens of the batch, Q
queries that share a key/value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, eq=False)
class Branching:
    """How the tokens of a segment hang together that are no chain."""

    first: int
    """Entry where the tree begins; those before it are visible to every token."""
    sees: npt.NDArray[np.bool_]
    """[length, start + length - first] which entries from ``first`` on each token of the segment sees."""
    positions: tuple[int, ...]
    """[length] of the tokens in the request."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Consecutive entries of one request in a ragged batch: a chain, unless they branch."""

    slot: int
    start: int
    """Entries of the slot that come before."""
    length: int
    branching: Branching | None = None


class SlotCache:
    """Preallocated keys and values, [L, S, M, P, E] each. Memory is touched as positions are written."""

    def __init__(self, layers: int, slots: int, kv_heads: int, positions: int, head_dim: int) -> None:
        shape = (layers, slots, kv_heads, positions, head_dim)
        self.positions = positions
        self._keys, self._values = torch.empty(shape), torch.empty(shape)
        self._by_layer = list(zip(self._keys.unbind(), self._values.unbind(), strict=True))

    def attend(self, layer: int, batch: RaggedBatch, q_TNE: Tensor, k_TME: Tensor, v_TME: Tensor) -> Tensor:
        """Write the batch's keys and values into their slots and attend over what each token may see.

        Returns:
            [T, N, E] attended values.
        """
        self.write(layer, batch, k_TME, v_TME)
        return self.read(layer, batch, q_TNE)

    def write(self, layer: int, batch: RaggedBatch, k_TME: Tensor, v_TME: Tensor) -> None:
        """Put keys and values where the batch's segments say."""
        keys_SMPE, values_SMPE = self._by_layer[layer]
        keys_SMPE[batch.slots_T, :, batch.entries_T] = k_TME
        values_SMPE[batch.slots_T, :, batch.entries_T] = v_TME

    def read(self, layer: int, batch: RaggedBatch, q_TNE: Tensor) -> Tensor:
        """Attend over entries that are written already.

        Query heads that share a key/value head are folded into its query axis, so that the cache is never repeated.

        Returns:
            [T, N, E] attended values.
        """
        tokens, heads, size = q_TNE.shape
        kv_heads = self._keys.shape[2]
        groups = heads // kv_heads
        parts = batch.parts(self._keys, self._values, groups)
        # Laid out by key/value head once, so that each segment's queries are a view.
        q_1MQE = q_TNE.view(tokens, kv_heads, groups, size).transpose(0, 1).reshape(1, kv_heads, tokens * groups, size)
        attended = [
            F.scaled_dot_product_attention(folded, part.keys_1MPE[layer], part.values_1MPE[layer], attn_mask=part.mask)
            for part, folded in zip(
                parts, q_1MQE.split_with_sizes([part.queries for part in parts], dim=2), strict=True
            )
        ]
        out_1MQE = torch.cat(attended, dim=2) if len(attended) > 1 else attended[0]
        return out_1MQE.view(kv_heads, tokens, groups, size).transpose(0, 1).reshape(tokens, heads, size)

    def keep(self, slot: int, start: int, path: Sequence[int]) -> None:
        """Move the entries of an accepted path together.

        Args:
            slot: The request's slot.
            start: Entry of the tree's first node.
            path: Nodes that were accepted, in order.
        """
        if list(path) == list(range(len(path))):
            return
        entries = torch.tensor([start + node for node in path])
        for cached in (self._keys, self._values):
            cached[:, slot, :, start : start + len(path)] = cached[:, slot, :, entries]


class _Part(NamedTuple):
    """One segment as attention needs it."""

    queries: int
    """Q: groups * length."""
    keys_1MPE: tuple[Tensor, ...]
    """Of each layer, up to the segment's end."""
    values_1MPE: tuple[Tensor, ...]
    mask: Tensor | None
    """[Q, end]"""


class RaggedBatch:
    """The segments of one forward pass over one cache, in the order of their tokens."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self._parts: list[_Part] = []

    @cached_property
    def positions_T(self) -> Tensor:
        """[T] position of every token in its request; the nodes of a tree stand at their depth."""
        return torch.tensor([position for s in self.segments for position in _positions(s)])

    @cached_property
    def slots_T(self) -> Tensor:
        """[T] slot of every token."""
        return torch.tensor([s.slot for s in self.segments for _ in range(s.length)])

    @cached_property
    def entries_T(self) -> Tensor:
        """[T] where in its slot every token lies."""
        return torch.tensor([entry for s in self.segments for entry in range(s.start, s.start + s.length)])

    @cached_property
    def last_rows(self) -> list[int]:
        """Row of the last token of each segment."""
        rows, end = [], 0
        for segment in self.segments:
            end += segment.length
            rows.append(end - 1)
        return rows

    def parts(self, keys_LSMPE: Tensor, values_LSMPE: Tensor, groups: int) -> list[_Part]:
        """Each segment's mask and entries of the cache; built once for all layers."""
        if not self._parts:
            for segment in self.segments:
                end, slot = segment.start + segment.length, slice(segment.slot, segment.slot + 1)
                keys, values = keys_LSMPE[:, slot, :, :end].unbind(), values_LSMPE[:, slot, :, :end].unbind()
                self._parts.append(_Part(groups * segment.length, keys, values, _mask(segment, groups)))
        return self._parts


def _positions(segment: Segment) -> Sequence[int]:
    if segment.branching is not None:
        return segment.branching.positions
    return range(segment.start, segment.start + segment.length)


def _mask(segment: Segment, groups: int) -> Tensor | None:
    """0 where a token may look, -inf elsewhere; None where all of them see everything."""
    end, branching = segment.start + segment.length, segment.branching
    visible = torch.ones(segment.length, end, dtype=torch.bool)
    if branching is not None:
        visible[:, branching.first :] = torch.from_numpy(branching.sees)
    elif segment.length == 1:
        return None
    else:
        visible = visible.tril_(segment.start)
    return torch.zeros(visible.shape).masked_fill_(~visible, float("-inf")).repeat_interleave(groups, 0)
