"""Keys and values of running requests, one slot a request, and attention over a ragged batch of them.

A forward pass runs over the tokens of all requests laid end to end, without padding. A ``Segment`` says which of them
belong to which slot and where they begin in it. Tokens that verification rejected leave stale entries behind; the next
segment of the slot begins at the last committed token and overwrites them.

Shape suffixes: S slots, M key/value heads, P positions, E head size, N query heads, T tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one request in a ragged batch."""

    slot: int
    start: int
    """Position of the first of them in the request."""
    length: int


class SlotCache:
    """Preallocated keys and values: ``layers`` pairs of [S, M, P, E]. Memory is touched as positions are written."""

    def __init__(self, layers: int, slots: int, kv_heads: int, positions: int, head_dim: int) -> None:
        shape = (slots, kv_heads, positions, head_dim)
        self._layers = [(torch.empty(shape), torch.empty(shape)) for _ in range(layers)]

    def attend(self, layer: int, batch: RaggedBatch, q_NTE: Tensor, k_MTE: Tensor, v_MTE: Tensor) -> Tensor:
        """Write the batch's keys and values into their slots and attend causally over each slot.

        Query heads that share a key/value head are folded into its query axis, so that the cache is never repeated.

        Returns:
            [T, N, E] attended values.
        """
        keys_SMPE, values_SMPE = self._layers[layer]
        heads, tokens, size = q_NTE.shape
        groups = heads // k_MTE.shape[0]
        out_TNE = q_NTE.new_empty(tokens, heads, size)
        for segment, rows, mask in batch.parts(groups):
            end = segment.start + segment.length
            keys_MPE, values_MPE = keys_SMPE[segment.slot, :, :end], values_SMPE[segment.slot, :, :end]
            keys_MPE[:, segment.start :] = k_MTE[:, rows]
            values_MPE[:, segment.start :] = v_MTE[:, rows]
            folded = q_NTE[:, rows].reshape(1, -1, groups * segment.length, size)
            attended = F.scaled_dot_product_attention(folded, keys_MPE[None], values_MPE[None], attn_mask=mask)
            out_TNE[rows] = attended.view(heads, segment.length, size).transpose(0, 1)
        return out_TNE


class RaggedBatch:
    """The segments of one forward pass, in the order of their tokens."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self._parts: list[tuple[Segment, slice, Tensor | None]] = []
        self._groups = 0

    @property
    def positions_T(self) -> Tensor:
        """[T] position of every token in its request."""
        return torch.cat([torch.arange(s.start, s.start + s.length) for s in self.segments])

    @property
    def last_rows(self) -> list[int]:
        """Row of the last token of each segment."""
        rows, end = [], 0
        for segment in self.segments:
            end += segment.length
            rows.append(end - 1)
        return rows

    def parts(self, groups: int) -> list[tuple[Segment, slice, Tensor | None]]:
        """Each segment with its rows and its mask [groups * length, end]; built once for all layers."""
        if self._groups != groups:
            self._groups, self._parts, row = groups, [], 0
            for segment in self.segments:
                self._parts.append((segment, slice(row, row + segment.length), _causal(segment, groups)))
                row += segment.length
        return self._parts


def _causal(segment: Segment, groups: int) -> Tensor | None:
    """True where a token may look; None for a single token, which sees everything before it."""
    if segment.length == 1:
        return None
    end = segment.start + segment.length
    mask = torch.ones(segment.length, end, dtype=torch.bool).tril(segment.start)
    return mask.repeat(groups, 1)
