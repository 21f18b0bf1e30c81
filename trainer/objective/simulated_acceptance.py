"""Simulated acceptance: replay the draft's chains against the committed tokens, as each request was sampled.

**Greedy**, or of unknown sampling: the chain consists of the draft's most likely tokens. A token is accepted if it is
the committed one.

**Sampled**: the expected acceptance of rejection sampling at the request's temperature, top-p and top-k. A chain x_1,
x_2, .. is accepted up to depth k with probability

    E[ min(1, q(x_1) / p(x_1)) .. min(1, q(x_k-1) / p(x_k-1)) sum_v min(p(v), q(v)) ]

over the target's own tokens, of which the committed ones are a sample; p and q are the distributions after the tokens
before. So the mean over positions is unbiased, and the last factor needs no luck with the committed token.
``trainer.objective.sampled_acceptance`` says what is unknown about p.

Shapes: B samples, T tokens of the longest sample, A chains, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from schemas.speculator.network import EagleDraft
from trainer.data.batch import Batch, collate, group_by_length
from trainer.data.samples import Sample, Teacher
from trainer.objective.sampled_acceptance import RejectionAcceptance, read_choice_probs, rejection_acceptance
from trainer.objective.training_time_test import DraftUnroll


class SimulatedAcceptance(NamedTuple):
    """Accepted draft tokens, and the positions from which a chain was drafted."""

    tokens: float
    """Expected for sampled requests; whole for greedy ones."""
    positions: float
    """Whole where the samples have no weights."""

    @property
    def accepted_per_step(self) -> float:
        """Accepted tokens per verify step, bonus token excluded."""
        return self.tokens / self.positions if self.positions else 0.0

    def weigh(self, weight: float) -> SimulatedAcceptance:
        """Return the acceptance of a sample that stands for ``weight`` samples."""
        return SimulatedAcceptance(self.tokens * weight, self.positions * weight)


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
    """Draft chains of ``lookahead`` tokens from every position that serving drafts from; count accepted tokens.

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
    """Return [B, T] float64: the accepted tokens of a chain from each root; 0 elsewhere.

    Args:
        draft: The draft.
        embeddings_VH: The target's token embeddings.
        batch: Samples.
        lookahead: Length of the chains, which end at the last token of a sample at the latest.
        roots_BT: Tokens after which a chain starts; never the first one of a sample.
    """
    sample_A, root_A = roots_BT.nonzero(as_tuple=True)
    accepted_BT = torch.zeros(roots_BT.shape, dtype=torch.float64, device=roots_BT.device)
    reach_A = accepted_BT.new_ones(len(root_A))
    unroll = DraftUnroll(draft, embeddings_VH, batch.tokens_BT, batch.features_BTF, batch.position_B)
    tokens_BT = F.pad(batch.tokens_BT, (0, 1))
    hidden_AH = unroll.first(sample_A, root_A - 1)
    for k in range(lookahead):
        committed_A = tokens_BT[sample_A, root_A + k + 1]
        rate_A, given_A = _accept(draft, draft.logits(hidden_AH), batch, (sample_A, root_A + k), committed_A)
        inside_A = root_A + k + 1 < batch.lengths_B[sample_A]
        accepted_BT[sample_A, root_A] += torch.where(inside_A, reach_A * rate_A, 0)
        reach_A = torch.where(inside_A, reach_A * given_A, 0)
        (on_A,) = (reach_A > 0).nonzero(as_tuple=True)
        sample_A, root_A, reach_A = sample_A[on_A], root_A[on_A], reach_A[on_A]
        if k + 1 < lookahead:
            hidden_AH = unroll.advance(on_A, committed_A[on_A])
    return accepted_BT


def _accept(
    draft: EagleDraft, logits_AD: Tensor, batch: Batch, at: tuple[Tensor, Tensor], committed_A: Tensor
) -> RejectionAcceptance:
    """Return the acceptance of the draft token after each position (sample [A], token [A])."""
    right_A = (draft.to_target_ids(logits_AD.argmax(dim=-1)) == committed_A).double()
    rate_A, given_A = right_A, right_A.clone()
    for sampling in {sampling for sampling in batch.sampling if sampling is not None and not sampling.greedy}:
        is_own_B = torch.tensor([own == sampling for own in batch.sampling], device=logits_AD.device)
        (own_A,) = is_own_B[at[0]].nonzero(as_tuple=True)
        where = at[0][own_A], at[1][own_A]
        teacher = Teacher(batch.teacher_BT.ids[where], batch.teacher_BT.logprobs[where])
        probs = read_choice_probs(draft, logits_AD[own_A], teacher, committed_A[own_A], sampling)
        rate_A[own_A], given_A[own_A] = rejection_acceptance(*probs)
    return RejectionAcceptance(rate_A, given_A)
