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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

CPU = torch.device("cpu")


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

    def __init__(
        self, layers: int, slots: int, kv_heads: int, positions: int, head_dim: int, device: torch.device = CPU
    ) -> None:
        shape = (layers, slots, kv_heads, positions, head_dim)
        self.slots, self.positions = slots, positions
        self._keys, self._values = torch.empty(shape, device=device), torch.empty(shape, device=device)
        if device != CPU:
            # Padding attends to entries that no request has written, and 0 x NaN would be NaN.
            self._keys.zero_()
            self._values.zero_()
        self._by_layer = list(zip(self._keys.unbind(), self._values.unbind(), strict=True))

    def attend(self, layer: int, batch: Tokens, q_TNE: Tensor, k_TME: Tensor, v_TME: Tensor) -> Tensor:
        """Write the batch's keys and values into their slots and attend over what each token may see.

        Returns:
            [T, N, E] attended values.
        """
        self.write(layer, batch, k_TME, v_TME)
        return self.read(layer, batch, q_TNE)

    def write(self, layer: int, batch: Tokens, k_TME: Tensor, v_TME: Tensor) -> None:
        """Put keys and values where the batch's segments say."""
        keys_SMPE, values_SMPE = self._by_layer[layer]
        keys_SMPE[batch.slots_T, :, batch.entries_T] = k_TME
        values_SMPE[batch.slots_T, :, batch.entries_T] = v_TME

    def read(self, layer: int, batch: Tokens, q_TNE: Tensor) -> Tensor:
        """Attend over entries that are written already: [T, N, E] attended values."""
        return batch.attend(layer, self._keys, self._values, q_TNE)

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


class Tokens(Protocol):
    """The tokens of one forward pass, and what each of them sees in a cache."""

    @property
    def positions_T(self) -> Tensor:
        """[T] position of every token in its request."""

    @property
    def slots_T(self) -> Tensor:
        """[T] slot of every token."""

    @property
    def entries_T(self) -> Tensor:
        """[T] where in its slot every token lies."""

    def attend(self, layer: int, keys_LSMPE: Tensor, values_LSMPE: Tensor, q_TNE: Tensor) -> Tensor:
        """[T, N, E] values attended over, of a layer's entries."""


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

    def __init__(self, segments: Sequence[Segment], device: torch.device = CPU) -> None:
        self.segments = tuple(segments)
        self._device = device
        self._parts: list[_Part] = []

    @cached_property
    def positions_T(self) -> Tensor:
        """[T] position of every token in its request; the nodes of a tree stand at their depth."""
        return self._integers(position for s in self.segments for position in positions_of(s))

    @cached_property
    def slots_T(self) -> Tensor:
        """[T] slot of every token."""
        return self._integers(s.slot for s in self.segments for _ in range(s.length))

    @cached_property
    def entries_T(self) -> Tensor:
        """[T] where in its slot every token lies."""
        return self._integers(entry for s in self.segments for entry in range(s.start, s.start + s.length))

    @cached_property
    def last_rows(self) -> list[int]:
        """Row of the last token of each segment."""
        rows, end = [], 0
        for segment in self.segments:
            end += segment.length
            rows.append(end - 1)
        return rows

    def attend(self, layer: int, keys_LSMPE: Tensor, values_LSMPE: Tensor, q_TNE: Tensor) -> Tensor:
        """Attend segment by segment, without padding.

        Query heads that share a key/value head are folded into its query axis, so that the cache is never repeated.
        """
        tokens, heads, size = q_TNE.shape
        kv_heads = keys_LSMPE.shape[2]
        groups = heads // kv_heads
        parts = self._laid_out(keys_LSMPE, values_LSMPE, groups)
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

    def _integers(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), device=self._device)

    def _laid_out(self, keys_LSMPE: Tensor, values_LSMPE: Tensor, groups: int) -> list[_Part]:
        """Each segment's mask and entries of the cache; built once for all layers."""
        if not self._parts:
            for segment in self.segments:
                end, slot = segment.start + segment.length, slice(segment.slot, segment.slot + 1)
                keys, values = keys_LSMPE[:, slot, :, :end].unbind(), values_LSMPE[:, slot, :, :end].unbind()
                self._parts.append(
                    _Part(groups * segment.length, keys, values, _mask(segment, groups, keys_LSMPE.device))
                )
        return self._parts


def positions_of(segment: Segment) -> Sequence[int]:
    """[length] position of each token of a segment in its request."""
    if segment.branching is not None:
        return segment.branching.positions
    return range(segment.start, segment.start + segment.length)


def seen_by(segment: Segment) -> npt.NDArray[np.bool_]:
    """[length, start + length] which entries of its slot each token of a segment sees."""
    end, branching = segment.start + segment.length, segment.branching
    seen = np.ones((segment.length, end), np.bool_)
    if branching is None:
        return np.tril(seen, segment.start)
    seen[:, branching.first :] = branching.sees
    return seen


def _mask(segment: Segment, groups: int, device: torch.device) -> Tensor | None:
    """0 where a token may look, -inf elsewhere; None where all of them see everything."""
    if segment.branching is None and segment.length == 1:
        return None
    seen = torch.from_numpy(seen_by(segment))
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).repeat_interleave(groups, 0).to(device)
