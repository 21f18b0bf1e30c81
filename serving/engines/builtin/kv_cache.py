"""Keys and values of running sequences, one slot per sequence, and attention over a ragged batch.

A forward runs over the tokens of all sequences laid end to end, without padding. A ``Segment`` says which tokens belong
to which slot and at which entry they start. Rejected tokens leave stale entries; the next segment of the slot starts
after the last committed token and overwrites them.

On a CPU a call of attention takes longer than its arithmetic. So segments of one length attend in one call if a slice
of the slots selects them: up to the end of the longest of them. A mask hides the entries behind the end of the others,
which must be finite, because a score of NaN plus -inf is NaN.

The nodes of a draft tree occupy consecutive entries of their slot, whatever their depth: the mask follows the parent
links, and ``keep_path`` moves the entries of the accepted path together afterwards.

Shape suffixes: L layers, S slots, M key/value heads, P entries of a slot, E head size, N query heads, T tokens of the
batch, G segments that attend together, W tokens of each of them, Q queries that share a key/value head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

CPU = torch.device("cpu")

MAX_PADDING = 64
"""Entries that a segment may be padded with: attending to more takes longer than another call."""


@dataclass(frozen=True, slots=True, eq=False)
class TreeLayout:
    """Positions and visibility of a segment's tokens that form a tree."""

    first_entry: int
    """Entry where the tree starts; every token sees the entries before it."""
    sees: npt.NDArray[np.bool_]
    """[length, start + length - first_entry] which entries from ``first_entry`` on each token of the segment sees."""
    positions: tuple[int, ...]
    """[length] position of each token in its sequence."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Consecutive entries of one slot in a ragged batch: a chain unless ``tree`` is set."""

    slot: int
    start: int
    """Number of entries before the segment."""
    length: int
    tree: TreeLayout | None = None


class KVCache:
    """Preallocated keys and values, [L, S, M, P, E] each. The system commits memory as entries are written."""

    def __init__(
        self, layers: int, slots: int, kv_heads: int, positions: int, head_dim: int, device: torch.device = CPU
    ) -> None:
        shape = (layers, slots, kv_heads, positions, head_dim)
        self.slots, self.positions = slots, positions
        # Padding attends to entries that no sequence has written.
        self._keys, self._values = _zeros(shape, device), _zeros(shape, device)
        self._by_layer = list(zip(self._keys.unbind(), self._values.unbind(), strict=True))

    def attend(self, layer: int, batch: BatchLayout, q_TNE: Tensor, k_TME: Tensor, v_TME: Tensor) -> Tensor:
        """Write the batch's keys and values, then attend.

        Returns:
            [T, N, E] attended values.
        """
        self.write(layer, batch, k_TME, v_TME)
        return self.read(layer, batch, q_TNE)

    def write(self, layer: int, batch: BatchLayout, k_TME: Tensor, v_TME: Tensor) -> None:
        """Write keys and values to the entries of the batch."""
        keys_SMPE, values_SMPE = self._by_layer[layer]
        keys_SMPE[batch.slots_T, :, batch.entries_T] = k_TME
        values_SMPE[batch.slots_T, :, batch.entries_T] = v_TME

    def read(self, layer: int, batch: BatchLayout, q_TNE: Tensor) -> Tensor:
        """Attend over entries that are already written; return the attended values [T, N, E]."""
        return batch.attend(layer, self._keys, self._values, q_TNE)

    def clear(self, slot: int | slice, entries: slice = slice(None)) -> None:
        """Zero entries whose values may not be finite: padding also attends to stale entries."""
        self._keys[:, slot, ..., entries, :].zero_()
        self._values[:, slot, ..., entries, :].zero_()

    def allocate_blocks(self, blocks: int, length: int) -> Tensor:
        """Return memory for keys and values of so many runs of entries, [blocks, 2, L, M, length, E]."""
        layers, _, kv_heads, _, head_dim = self._keys.shape
        return self._keys.new_empty(blocks, 2, layers, kv_heads, length, head_dim)

    def copy_out(self, slot: int, start: int, block: Tensor) -> None:
        """Copy entries of a slot from ``start`` on into a block."""
        entries = slice(start, start + block.shape[-2])
        for cached, part in ((self._keys, block[0]), (self._values, block[1])):
            part.copy_(cached[:, slot, :, entries])

    def copy_in(self, slot: int, start: int, block: Tensor) -> None:
        """Copy a block into the entries of a slot from ``start`` on."""
        entries = slice(start, start + block.shape[-2])
        for cached, part in ((self._keys, block[0]), (self._values, block[1])):
            cached[:, slot, :, entries] = part

    def keep_path(self, slot: int, start: int, path: Sequence[int]) -> None:
        """Move the entries of an accepted path together.

        Args:
            slot: The sequence's slot.
            start: Entry of the tree's first node.
            path: Accepted nodes in order.
        """
        if list(path) == list(range(len(path))):
            return
        entries = torch.tensor([start + node for node in path])
        for cached in (self._keys, self._values):
            cached[:, slot, :, start : start + len(path)] = cached[:, slot, :, entries]


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    # NumPy leaves it to the system to zero a page when it is first written.
    return torch.from_numpy(np.zeros(shape, np.float32)) if device == CPU else torch.zeros(shape, device=device)


class BatchLayout(Protocol):
    """Where the tokens of one forward lie in a KV cache, and which entries each of them sees."""

    @property
    def positions_T(self) -> Tensor:
        """[T] position of each token in its sequence."""

    @property
    def slots_T(self) -> Tensor:
        """[T] slot of each token."""

    @property
    def entries_T(self) -> Tensor:
        """[T] entry of each token in its slot."""

    def attend(self, layer: int, keys_LSMPE: Tensor, values_LSMPE: Tensor, q_TNE: Tensor) -> Tensor:
        """Attend over a layer's entries; return the attended values [T, N, E]."""


class _JoinedSegments(NamedTuple):
    """Segments that attend together."""

    segments: int
    """G"""
    length: int
    """W"""
    keys_GMPE: tuple[Tensor, ...]
    """By layer, up to the end of the longest segment."""
    values_GMPE: tuple[Tensor, ...]
    mask: Tensor | None
    """[G, 1, Q, end]"""


class RaggedBatch:
    """The segments of one forward over one KV cache, in the order of their tokens."""

    def __init__(self, segments: Sequence[Segment], device: torch.device = CPU) -> None:
        self.segments = tuple(segments)
        self._device = device
        self._groups: list[_JoinedSegments] = []

    @cached_property
    def positions_T(self) -> Tensor:
        """[T] position of each token in its sequence; the position of a tree's node follows from its depth."""
        return self._to_tensor(position for s in self.segments for position in token_positions(s))

    @cached_property
    def slots_T(self) -> Tensor:
        """[T] slot of each token."""
        return self._to_tensor(s.slot for s in self.segments for _ in range(s.length))

    @cached_property
    def entries_T(self) -> Tensor:
        """[T] entry of each token in its slot."""
        return self._to_tensor(entry for s in self.segments for entry in range(s.start, s.start + s.length))

    @cached_property
    def last_rows(self) -> list[int]:
        """Row of each segment's last token."""
        rows, end = [], 0
        for segment in self.segments:
            end += segment.length
            rows.append(end - 1)
        return rows

    def attend(self, layer: int, keys_LSMPE: Tensor, values_LSMPE: Tensor, q_TNE: Tensor) -> Tensor:
        """Attend group by group.

        Query heads that share a key/value head are folded into its query axis, so that the cache is never repeated.
        """
        _, heads, size = q_TNE.shape
        kv_heads = keys_LSMPE.shape[2]
        shared = heads // kv_heads
        groups = self._join_segments(keys_LSMPE, values_LSMPE, shared)
        attended = []
        for group, q_GWNE in zip(
            groups, q_TNE.split_with_sizes([group.segments * group.length for group in groups]), strict=True
        ):
            by_head = (group.segments, group.length, kv_heads, shared, size)
            q_GMQE = q_GWNE.view(by_head).transpose(1, 2).flatten(2, 3)
            out_GMQE = F.scaled_dot_product_attention(
                q_GMQE, group.keys_GMPE[layer], group.values_GMPE[layer], attn_mask=group.mask
            )
            out_GWMQE = out_GMQE.view(group.segments, kv_heads, group.length, shared, size).transpose(1, 2)
            attended.append(out_GWMQE.reshape(-1, heads, size))
        return torch.cat(attended) if len(attended) > 1 else attended[0]

    def _to_tensor(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), device=self._device)

    def _join_segments(self, keys_LSMPE: Tensor, values_LSMPE: Tensor, shared: int) -> list[_JoinedSegments]:
        """Return the groups with their entries of the cache and masks; built once for all layers."""
        if not self._groups:
            for joined in join_segments(self.segments):
                first, last = joined[0].slot, joined[-1].slot
                slots = slice(first, last + 1, (last - first) // max(len(joined) - 1, 1) or 1)
                longest = max(segment.start + segment.length for segment in joined)
                keys, values = (x[:, slots, :, :longest].unbind() for x in (keys_LSMPE, values_LSMPE))
                mask = _attention_mask(joined, longest, shared, self._device)
                self._groups.append(_JoinedSegments(len(joined), joined[0].length, keys, values, mask))
        return self._groups


def join_segments(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Yield the segments in groups that attend together: of one length, with similar ends, in slots at equal steps."""
    group: list[Segment] = []
    for segment in segments:
        if group and not _may_join(group, segment):
            yield group
            group = []
        group.append(segment)
    yield group


def _may_join(group: Sequence[Segment], segment: Segment) -> bool:
    step = segment.slot - group[-1].slot
    starts = [segment.start, *(other.start for other in group)]
    return (
        segment.length == group[0].length
        and step > 0
        and (len(group) == 1 or step == group[1].slot - group[0].slot)
        and max(starts) - min(starts) <= MAX_PADDING
    )


def token_positions(segment: Segment) -> Sequence[int]:
    """Return the position [length] of each token of a segment in its sequence."""
    if segment.tree is not None:
        return segment.tree.positions
    return range(segment.start, segment.start + segment.length)


def visible_entries(segment: Segment) -> npt.NDArray[np.bool_]:
    """Return which entries of its slot each token of a segment sees, [length, start + length]."""
    end, tree = segment.start + segment.length, segment.tree
    sees = np.ones((segment.length, end), np.bool_)
    if tree is None:
        return np.tril(sees, segment.start)
    sees[:, tree.first_entry :] = tree.sees
    return sees


def _attention_mask(joined: Sequence[Segment], longest: int, shared: int, device: torch.device) -> Tensor | None:
    """Return [G, 1, Q, longest] 0 for visible entries and -inf for others; None if every token sees every entry."""
    if all(segment.length == 1 and segment.tree is None for segment in joined):
        ends = [segment.start + 1 for segment in joined]
        if min(ends) == longest:
            return None
        sees_GWP = torch.arange(longest) < torch.tensor(ends)[:, None, None]
    else:
        sees_GWP = torch.zeros(len(joined), joined[0].length, longest, dtype=torch.bool)
        for sees_WP, segment in zip(sees_GWP.numpy(), joined, strict=True):
            sees_WP[:, : segment.start + segment.length] = visible_entries(segment)
    mask_GWP = torch.zeros(sees_GWP.shape).masked_fill_(~sees_GWP, float("-inf"))
    return mask_GWP.repeat_interleave(shared, 1)[:, None].to(device)
