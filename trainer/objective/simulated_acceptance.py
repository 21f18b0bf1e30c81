"""What serving would accept: the draft's greedy chains replayed against the tokens that were committed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from schemas.speculator.network import EagleDraft
from trainer.data.samples import Batch, Window, collate, of_like_length
from trainer.objective.unroll import Unroll


class Accepted(NamedTuple):
    """Drafted tokens that were right, over the positions from which a chain was drafted."""

    tokens: int
    positions: int

    @property
    def length(self) -> float:
        """Accepted tokens per step: the bonus token is not in it."""
        return self.tokens / max(self.positions, 1)


def added_up(parts: Iterable[Accepted]) -> Accepted:
    """Of several windows together."""
    tokens, positions = zip(*[(0, 0), *parts], strict=True)
    return Accepted(sum(tokens), sum(positions))


def accepted_per_step(draft: EagleDraft, embeddings_VH: Tensor, windows: Sequence[Window], lookahead: int) -> Accepted:
    """``simulated_accepted_per_step`` over any number of windows, computed where the embeddings are."""
    return added_up(by_window(draft, embeddings_VH, windows, lookahead))


def by_window(draft: EagleDraft, embeddings_VH: Tensor, windows: Sequence[Window], lookahead: int) -> list[Accepted]:
    """The same of each window, in their order."""
    device = embeddings_VH.device
    draft, found = draft.to(device), dict[Window, Accepted]()
    for alike in of_like_length(windows):
        batch = collate(alike).to(device)
        found |= zip(alike, _accepted(draft, embeddings_VH, batch, lookahead), strict=True)
    return [found[window] for window in windows]


def simulated_accepted_per_step(draft: EagleDraft, embeddings_VH: Tensor, batch: Batch, lookahead: int) -> Accepted:
    """How far greedy chains of ``lookahead`` tokens are right, from every position that serving drafts from.

    A chain starts behind every token after which the target's distribution is known, if the window holds ``lookahead``
    tokens more. A committed token outside the draft vocabulary is a miss, and a chain ends at its first miss: the draft
    is given the committed tokens, which up to there are its own.
    """
    return added_up(_accepted(draft, embeddings_VH, batch, lookahead))


@torch.inference_mode()
def _accepted(draft: EagleDraft, embeddings_VH: Tensor, batch: Batch, lookahead: int) -> list[Accepted]:
    """Of each window."""
    windows = len(batch.lengths_B)
    length = batch.tokens_BT.shape[1]
    roots_BT = batch.known_BT & (
        torch.arange(length, device=batch.lengths_B.device) + lookahead < batch.lengths_B[:, None]
    )
    roots_BT[:, 0] = False
    window, root = roots_BT.nonzero(as_tuple=True)
    positions_B = window.bincount(minlength=windows)
    accepted_B = torch.zeros_like(positions_B)
    unroll = Unroll(draft, embeddings_VH, batch.tokens_BT, batch.features_BTF)
    hidden = unroll.first(window, root - 1)
    for k in range(lookahead):
        drafted = draft.to_target_ids(draft.logits(hidden).argmax(dim=-1))
        committed = batch.tokens_BT[window, root + k + 1]
        (right,) = (drafted == committed).nonzero(as_tuple=True)
        window, root = window[right], root[right]
        accepted_B += window.bincount(minlength=windows)
        if k + 1 < lookahead:
            hidden = unroll.advance(right, committed[right])
    return [Accepted(*both) for both in zip(accepted_B.tolist(), positions_B.tolist(), strict=True)]
