"""Simulated acceptance: replay the draft's chains against the committed tokens, as each request was sampled.

**Greedy**, or of unknown sampling: the chain consists of the draft's most likely tokens. A token is accepted if it is
the committed one.

**Sampled**: the expected acceptance of rejection sampling at the request's temperature, top-p and top-k. A chain x_1,
x_2, .. is accepted up to depth k with probability

    E[ min(1, q(x_1) / p(x_1)) .. min(1, q(x_k-1) / p(x_k-1)) sum_v min(p(v), q(v)) ]

over the target's own tokens, of which the committed ones are a sample; p and q are the distributions after the tokens
before. So the mean over positions is unbiased, and the last factor needs no luck with the committed token.
``trainer.objective.sampled_acceptance`` says what is unknown about p.

**Verify steps.** A node begins a verify step where the one before ended, which is more often where a draft token was
rejected than where it was accepted. So the acceptance from all positions is too high, and ``walk_requests`` counts the
chain from a position with the probability that a verify step begins there. For a sampled request that probability is
conditional on the committed tokens up to the position, so sums of accepted tokens and of verify steps are unbiased.

Shapes: B samples, T tokens of the longest sample, A chains, K tokens of a chain, R roots, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from schemas.speculator.network import EagleDraft
from trainer.data.batch import Batch, collate, group_by_length
from trainer.data.samples import Sample, Teacher
from trainer.objective.sampled_acceptance import RejectionAcceptance, read_choice_probs, rejection_acceptance
from trainer.objective.training_time_test import DraftUnroll

F64 = npt.NDArray[np.float64]


class SimulatedAcceptance(NamedTuple):
    """Accepted draft tokens and verify steps, as a node would run them."""

    tokens: float
    """Expected for sampled requests; whole for greedy ones."""
    verify_steps: float
    """The same; neither is whole where the samples have weights."""

    @property
    def accepted_per_step(self) -> float:
        """Accepted tokens per verify step, bonus token excluded."""
        return self.tokens / self.verify_steps if self.verify_steps else 0.0

    def weigh(self, weight: float) -> SimulatedAcceptance:
        """Return the acceptance of a sample that stands for ``weight`` samples."""
        return SimulatedAcceptance(self.tokens * weight, self.verify_steps * weight)


def sum_acceptance(parts: Iterable[SimulatedAcceptance]) -> SimulatedAcceptance:
    """Return the acceptance over several samples together."""
    tokens, verify_steps = zip(*[(0, 0), *parts], strict=True)
    return SimulatedAcceptance(sum(tokens), sum(verify_steps))


class ChainAcceptance(NamedTuple):
    """Acceptance of a chain from each root, [B, T, K] float64; 0 elsewhere and from the first miss on."""

    reach_BTK: Tensor
    """Probability that the tokens up to each depth are accepted, given the committed tokens."""
    accepted_BTK: Tensor
    """The same, given the committed tokens before that depth alone."""


@dataclass(frozen=True, slots=True, eq=False)
class SampleChains:
    """The chains from the roots of a sample: the tokens with which a verify step may begin."""

    position_R: npt.NDArray[np.int64]
    """Positions of the roots in the request, ascending."""
    reach_RK: F64
    """As in ``ChainAcceptance``; 0 for the last token of a request, which no step accepts: it is a bonus token."""
    accepted_R: F64
    """Accepted tokens of a chain."""


def simulate_acceptance(
    draft: EagleDraft, embeddings_VH: Tensor, samples: Sequence[Sample], lookahead: int
) -> SimulatedAcceptance:
    """Return the acceptance over any number of samples."""
    return sum_acceptance(walk_requests(samples, simulate_each(draft, embeddings_VH, samples, lookahead)))


def walk_requests(samples: Sequence[Sample], chains: Sequence[SampleChains]) -> list[SimulatedAcceptance]:
    """Walk the verify steps of each request from its first root on; return the acceptance of each sample.

    The parts of a request are walked as a whole. Where roots are missing, as those of a part that was dropped, the walk
    begins anew at the next one.

    Args:
        samples: The samples.
        chains: Of each sample, by ``simulate_each``.
    """
    if not samples:
        return []
    number = {request: n for n, request in enumerate(dict.fromkeys(sample.request for sample in samples))}
    order = sorted(range(len(samples)), key=lambda i: (number[samples[i].request], *chains[i].position_R[:1]))
    roots = [len(chains[i].position_R) for i in order]
    sample_R, request_R = np.repeat(order, roots), np.repeat([number[samples[i].request] for i in order], roots)
    position_R = np.concatenate([chains[i].position_R for i in order])
    follows_R = (np.diff(request_R) == 0) & (np.diff(position_R) == 1)
    stretches = np.split(np.concatenate([chains[i].reach_RK for i in order]), np.flatnonzero(~follows_R) + 1)
    starts_R = np.concatenate([expect_starts(reach_RK) for reach_RK in stretches])
    accepted_R = starts_R * np.concatenate([chains[i].accepted_R for i in order])
    sums = (np.bincount(sample_R, counted_R, len(samples)).tolist() for counted_R in (accepted_R, starts_R))
    return [SimulatedAcceptance(*both) for both in zip(*sums, strict=True)]


def expect_starts(reach_RK: F64) -> F64:
    """Return [R] the probabilities that a verify step starts at each root, if one starts at the first.

    A step that accepts k tokens and adds a bonus token is followed by one k + 1 positions later. So the probability
    that a step starts at a position is the sum, over earlier ones, of the probability that a step started there and
    ended here.

    Args:
        reach_RK: Probabilities that a step from each of consecutive roots accepts at least 1, 2, .. tokens.
    """
    roots, longest = reach_RK.shape
    exactly_RK1 = -np.diff(reach_RK, axis=1, prepend=1.0, append=0.0)
    starts = np.zeros(roots + longest + 1)
    starts[0] = 1.0
    for root in range(roots):
        starts[root + 1 : root + longest + 2] += starts[root] * exactly_RK1[root]
    return starts[:roots]


def simulate_each(
    draft: EagleDraft, embeddings_VH: Tensor, samples: Sequence[Sample], lookahead: int
) -> list[SampleChains]:
    """Return the chains of ``lookahead`` tokens of each sample, computed on the device of the embeddings.

    A verify step may begin with any output token of the sample's own rows but the last token of the request. A
    committed token outside the draft vocabulary is a miss, and a chain ends at its first miss: the draft reads the
    committed tokens, which up to that point are its own.
    """
    device = embeddings_VH.device
    draft, found = draft.to(device), dict[Sample, SampleChains]()
    for group in group_by_length(samples):
        batch = collate(group).to(device)
        found |= zip(group, _simulate(draft, embeddings_VH, batch, lookahead), strict=True)
    return [found[sample] for sample in samples]


def _simulate(draft: EagleDraft, embeddings_VH: Tensor, batch: Batch, lookahead: int) -> Iterator[SampleChains]:
    token_T = torch.arange(batch.tokens_BT.shape[1], device=batch.lengths_B.device)
    # The target chose the token after the first known one, the last of the prompt, without a draft.
    roots_BT = batch.known_BT & (token_T + 1 < batch.lengths_B[:, None])
    roots_BT[:, 0] = False
    roots_BT[:, 1:] &= (batch.known_BT & batch.own_BT)[:, :-1]
    # The last token of a request is the bonus token of its last verify step.
    drafted_TK = token_T[:, None] + torch.arange(1, lookahead + 1, device=token_T.device)
    inside_BTK = drafted_TK + 1 < batch.lengths_B[:, None, None]
    chains = simulate_chains(draft, embeddings_VH, batch, lookahead, roots_BT)
    reach_BTK, accepted_BTK = (torch.where(inside_BTK, probs_BTK, 0).cpu().numpy() for probs_BTK in chains)
    for position, roots_T, reach_TK, accepted_TK in zip(
        batch.position_B.tolist(), roots_BT.cpu().numpy(), reach_BTK, accepted_BTK, strict=True
    ):
        yield SampleChains(position + np.flatnonzero(roots_T), reach_TK[roots_T], accepted_TK[roots_T].sum(axis=1))


@torch.inference_mode()
def simulate_chains(
    draft: EagleDraft, embeddings_VH: Tensor, batch: Batch, lookahead: int, roots_BT: Tensor
) -> ChainAcceptance:
    """Return the acceptance of a chain from each root.

    Args:
        draft: The draft.
        embeddings_VH: The target's token embeddings.
        batch: Samples.
        lookahead: Length of the chains, which end at the last token of a sample at the latest.
        roots_BT: Tokens after which a chain starts; never the first one of a sample.
    """
    sample_A, root_A = roots_BT.nonzero(as_tuple=True)
    reach_BTK = torch.zeros(*roots_BT.shape, lookahead, dtype=torch.float64, device=roots_BT.device)
    accepted_BTK = torch.zeros_like(reach_BTK)
    reach_A = reach_BTK.new_ones(len(root_A))
    unroll = DraftUnroll(draft, embeddings_VH, batch.tokens_BT, batch.features_BTF, batch.position_B)
    tokens_BT = F.pad(batch.tokens_BT, (0, 1))
    hidden_AH = unroll.first(sample_A, root_A - 1)
    for k in range(lookahead):
        committed_A = tokens_BT[sample_A, root_A + k + 1]
        rate_A, given_A = _accept(draft, draft.logits(hidden_AH), batch, (sample_A, root_A + k), committed_A)
        inside_A = root_A + k + 1 < batch.lengths_B[sample_A]
        accepted_BTK[sample_A, root_A, k] = torch.where(inside_A, reach_A * rate_A, 0)
        reach_A = reach_BTK[sample_A, root_A, k] = torch.where(inside_A, reach_A * given_A, 0)
        (on_A,) = (reach_A > 0).nonzero(as_tuple=True)
        sample_A, root_A, reach_A = sample_A[on_A], root_A[on_A], reach_A[on_A]
        if k + 1 < lookahead:
            hidden_AH = unroll.advance(on_A, committed_A[on_A])
    return ChainAcceptance(reach_BTK, accepted_BTK)


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
