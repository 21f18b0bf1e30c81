"""Simulated acceptance: replay the draft's greedy chains against the committed tokens.

Shapes: B samples, T tokens of the longest sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from schemas.speculator.network import EagleDraft
from trainer.data.batch import Batch, collate, group_by_length
from trainer.data.samples import Sample
from trainer.objective.training_time_test import DraftUnroll


class SimulatedAcceptance(NamedTuple):
    """Accepted draft tokens, and the positions from which a chain was drafted."""

    tokens: int
    positions: int

    @property
    def accepted_per_step(self) -> float:
        """Accepted tokens per verify step, bonus token excluded."""
        return self.tokens / max(self.positions, 1)


def sum_acceptance(parts: Iterable[SimulatedAcceptance]) -> SimulatedAcceptance:
    """Return the acceptance over several samples or batches together."""
    tokens, positions = zip(*[(0, 0), *parts], strict=True)
    return SimulatedAcceptance(sum(tokens), sum(positions))


def simulate_acceptance(
    draft: EagleDraft, embeddings_VH: Tensor, samples: Sequence[Sample], lookahead: int
) -> SimulatedAcceptance:
    """Return the acceptance over any number of samples; see ``simulate_batch``."""
    return sum_acceptance(simulate_each(draft, embeddings_VH, samples, lookahead))


def simulate_each(
    draft: EagleDraft, embeddings_VH: Tensor, samples: Sequence[Sample], lookahead: int
) -> list[SimulatedAcceptance]:
    """Return the acceptance of each sample, computed on the device of the embeddings."""
    device = embeddings_VH.device
    draft, found = draft.to(device), dict[Sample, SimulatedAcceptance]()
    for group in group_by_length(samples):
        batch = collate(group).to(device)
        found |= zip(group, _simulate(draft, embeddings_VH, batch, lookahead), strict=True)
    return [found[sample] for sample in samples]


def simulate_batch(draft: EagleDraft, embeddings_VH: Tensor, batch: Batch, lookahead: int) -> SimulatedAcceptance:
    """Draft greedy chains of ``lookahead`` tokens from every position that serving drafts from; count right tokens.

    A chain starts after every token with a known target distribution, if the sample has ``lookahead`` more tokens. A
    committed token outside the draft vocabulary is a miss, and a chain ends at its first miss: the draft reads the
    committed tokens, which up to that point are its own.
    """
    return sum_acceptance(_simulate(draft, embeddings_VH, batch, lookahead))


def _simulate(draft: EagleDraft, embeddings_VH: Tensor, batch: Batch, lookahead: int) -> list[SimulatedAcceptance]:
    """Return the acceptance of each sample of a batch."""
    length = batch.tokens_BT.shape[1]
    roots_BT = batch.known_BT & (
        torch.arange(length, device=batch.lengths_B.device) + lookahead < batch.lengths_B[:, None]
    )
    roots_BT[:, 0] = False
    roots_BT[:, 1:] &= batch.own_BT[:, :-1]
    accepted_B = simulate_chains(draft, embeddings_VH, batch, lookahead, roots_BT).sum(dim=1)
    return [SimulatedAcceptance(*both) for both in zip(accepted_B.tolist(), roots_BT.sum(dim=1).tolist(), strict=True)]


@torch.inference_mode()
def simulate_chains(draft: EagleDraft, embeddings_VH: Tensor, batch: Batch, lookahead: int, roots_BT: Tensor) -> Tensor:
    """Return [B, T] the accepted tokens of a greedy chain from each root; 0 elsewhere.

    Args:
        draft: The draft.
        embeddings_VH: The target's token embeddings.
        batch: Samples.
        lookahead: Length of the chains, which end at the last token of a sample at the latest.
        roots_BT: Tokens after which a chain starts; never the first one of a sample.
    """
    sample, root = roots_BT.nonzero(as_tuple=True)
    accepted_BT = torch.zeros_like(batch.tokens_BT)
    unroll = DraftUnroll(draft, embeddings_VH, batch.tokens_BT, batch.features_BTF, batch.position_B)
    hidden = unroll.first(sample, root - 1)
    for k in range(lookahead):
        drafted = draft.to_target_ids(draft.logits(hidden).argmax(dim=-1))
        committed = F.pad(batch.tokens_BT, (0, lookahead))[sample, root + k + 1]
        (right,) = ((drafted == committed) & (root + k + 1 < batch.lengths_B[sample])).nonzero(as_tuple=True)
        sample, root = sample[right], root[right]
        accepted_BT[sample, root] += 1
        if k + 1 < lookahead:
            hidden = unroll.advance(right, committed[right])
    return accepted_BT
