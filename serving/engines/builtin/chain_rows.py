"""The rows of a draft step that continues chains: one row per sequence, which sees all entries of its slot.

A ``RaggedBatch`` of such rows computes the same. A draft step is so short that building the batch would take 4 to 10 %
of it.

Shape suffixes as in ``serving.engines.builtin.kv_cache``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_MAX_PADDING = 128
"""Entries that a sequence may be padded with: attending to more takes longer than another call."""


class _Group(NamedTuple):
    """Rows in consecutive slots with chains of similar length: one attention call."""

    rows: slice
    slots: slice
    ends: list[int]


class ChainRows:
    """One row per sequence on a CPU, placed behind the entries of its slot. Implements ``BatchLayout``.

    Args:
        places: Slot and entry of each row, by ascending slot.
    """

    def __init__(self, places: Sequence[tuple[int, int]]) -> None:
        self.slots_T, self.entries_T = torch.tensor(places).unbind(1)
        self.positions_T = self.entries_T
        """A chain's entries are its positions."""
        self._groups = list(_group(places))

    def attend(self, layer: int, keys_LSMPE: Tensor, values_LSMPE: Tensor, q_TNE: Tensor) -> Tensor:
        """Attend over the entries of each row's slot up to its own; return the attended values [T, N, E]."""
        keys_SMPE, values_SMPE = keys_LSMPE[layer], values_LSMPE[layer]
        # Query heads that share a key/value head are queries of that head.
        rows, _, size = q_TNE.shape
        q_TMQE = q_TNE.view(rows, keys_SMPE.shape[1], -1, size)
        attended = []
        for group, slots, ends in self._groups:
            longest = max(ends)
            mask = None
            if min(ends) < longest:
                mask = (torch.arange(longest) < torch.tensor(ends)[:, None])[:, None, None]
            keys, values = keys_SMPE[slots, :, :longest], values_SMPE[slots, :, :longest]
            attended.append(F.scaled_dot_product_attention(q_TMQE[group], keys, values, attn_mask=mask))
        out_TMQE = torch.cat(attended) if len(attended) > 1 else attended[0]
        return out_TMQE.flatten(1, 2)


def _group(places: Sequence[tuple[int, int]]) -> Iterator[_Group]:
    """Yield the rows in groups that attend together."""
    first = 0
    for row in range(1, len(places) + 1):
        entries = [entry for _, entry in places[first : row + 1]]
        joins = (
            row < len(places)
            and places[row][0] == places[row - 1][0] + 1
            and max(entries) - min(entries) <= _MAX_PADDING
        )
        if not joins:
            slot = places[first][0]
            ends = [entry + 1 for _, entry in places[first:row]]
            yield _Group(slice(first, row), slice(slot, slot + row - first), ends)
            first = row
