"""The probability that serving accepts each token of the chains that a draft proposes along a past request.

A chain starts at a root, a token of the answer, from the draft's state after it: the target's features of the tokens
before the root, and the root itself, as in ``serving.engines.builtin.eagle_drafter``. Along the chain the draft reads
the committed tokens, which as far as the chain is accepted are its own.

**Greedy.** The chain consists of the draft's most likely tokens. A token is accepted if it is the committed one.

**Sampled.** Target and draft choose by the same noise from their distributions p and q, as in
``serving.engines.builtin.noise``, and a token is accepted if both choose it. Both choose x with probability
1 / sum_v max(p(v) / p(x), q(v) / q(x)) (Daliri et al., arXiv 2408.07978), and the target chooses x with probability
p(x). The quotient is the probability that the draft proposed x, given that x was generated. The noise of a position is
independent of that of others, so it is exact at every depth.

**Unrecorded probabilities.** Only the target's top k are logged. The tail of p is treated as tokens as likely as the
last recorded one, which at temperature 1 is exact for the sum; with ``top_k`` up to the recorded number there is no
tail. A generated token that is not among the recorded ones counts as likely as the last of them, such tokens are
counted, and the draft is taken to put its remaining mass on other tokens of the tail than the target does: an
acceptance probability is underestimated, never overestimated.

Shapes: N tokens of the request, R roots, K longest draft, A live chains, F feature width, k teacher width, V target
vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from schemas.speculator.acceptance import sampling_probs
from schemas.speculator.network import EagleDraft
from trainer.data.samples import RequestSampling, Teacher
from trainer.objective.training_time_test import DraftUnroll
from trainer.replay.past_requests import PastRequest
from trainer.replay.verify_steps import F64

ROOTS_PER_UNROLL = 512
"""Chains that are computed together; bounds the memory of a long request."""


class TargetLikelihood(NamedTuple):
    """The target's probabilities under the request's sampling."""

    probs_R: Tensor
    """Of the generated tokens."""
    recorded_Rk: Tensor
    """Of the recorded tokens."""
    outside: int
    """Number of tokens that were not among the recorded ones."""


@torch.inference_mode()
def acceptance_probabilities(draft: EagleDraft, embeddings_VH: Tensor, past: PastRequest, longest: int) -> F64:
    """Return [R, K]: the probability that the draft's token at each depth is accepted, given the ones before it.

    Row i is the root at ``past.prompt + i``; the last token of the request is no root. Values past the end are 0. Each
    request is computed alone, so that its figures do not depend on other requests.
    """
    roots = torch.arange(past.prompt, len(past.tokens_N) - 1)
    likelihood = None if past.sampling.greedy else target_likelihood(past)
    found = torch.zeros(len(roots), longest, dtype=torch.float64)
    for start in range(0, len(roots), ROOTS_PER_UNROLL):
        group = roots[start : start + ROOTS_PER_UNROLL]
        found[group - past.prompt] = _unroll(draft, embeddings_VH, past, group, likelihood, longest)
    probs_RK: F64 = found.numpy()
    return probs_RK


def target_likelihood(past: PastRequest) -> TargetLikelihood:
    """Return the target's probability of each answer token under the request's sampling."""
    probs_Rk, least_R = apply_sampling(past.teacher, past.sampling)
    generated_R1 = past.tokens_N[past.prompt :, None]
    hit_Rk = past.teacher.ids == generated_R1
    own_R = torch.where(hit_Rk, probs_Rk, 0).sum(-1)
    return TargetLikelihood(torch.where(own_R > 0, own_R, least_R), probs_Rk, int((~hit_Rk.any(-1)).sum()))


def coupled_acceptance(own_p_R: Tensor, p_Rk: Tensor, own_q_R: Tensor, q_Rk: Tensor) -> Tensor:
    """Return [R] the probability that the draft chose the token that the target chose.

    Args:
        own_p_R: The target's probability of that token.
        p_Rk: The target's probabilities of some tokens.
        own_q_R: The draft's probability of that token.
        q_Rk: The draft's probabilities of the same tokens. The rest of both distributions lies on different tokens.
    """
    p_tail_R, q_tail_R = (1 - p_Rk.sum(-1)).clamp_min(0), (1 - q_Rk.sum(-1)).clamp_min(0)
    scaled_R = torch.maximum(p_Rk * own_q_R[:, None], q_Rk * own_p_R[:, None]).sum(-1)
    scaled_R = scaled_R + p_tail_R * own_q_R + q_tail_R * own_p_R
    return own_q_R / scaled_R.clamp_min(torch.finfo(scaled_R.dtype).tiny)


def apply_sampling(teacher: Teacher, sampling: RequestSampling) -> tuple[Tensor, Tensor]:
    """Apply temperature, top-k and nucleus sampling to the recorded distributions.

    Returns:
        [R, k] float64, 0 where a token is excluded, and [R] the smallest probability of a token that is not.
    """
    logprobs = teacher.logprobs.double()
    width = logprobs.shape[-1]
    weights = torch.softmax(torch.cat([logprobs / sampling.temperature, _tail(logprobs, sampling)], dim=-1), dim=-1)
    weights = weights[:, :width]
    if 0 < sampling.top_k < width:
        weights = weights.masked_fill(weights < weights[:, sampling.top_k - 1 : sampling.top_k], 0)
        weights = weights / weights.sum(-1, keepdim=True)
    if sampling.top_p < 1:
        before = weights.cumsum(-1) - weights
        least = weights.masked_fill(before >= sampling.top_p, torch.inf).amin(-1, keepdim=True)
        weights = weights.masked_fill(weights < least, 0)
        # A nucleus that exceeds the recorded tokens has the requested mass, as far as the record shows.
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(sampling.top_p)
    return weights, weights.masked_fill(weights == 0, torch.inf).amin(-1)


def _tail(logprobs: Tensor, sampling: RequestSampling) -> Tensor:
    """Return [R, 1]: the log-weight of all unrecorded tokens after temperature; -inf where top-k excludes them."""
    if 0 < sampling.top_k <= logprobs.shape[-1]:
        return torch.full_like(logprobs[:, :1], -torch.inf)
    missing = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(0)
    return missing.log() + logprobs[:, -1:] * (1 / sampling.temperature - 1)


def _unroll(
    draft: EagleDraft,
    embeddings_VH: Tensor,
    past: PastRequest,
    roots: Tensor,
    likelihood: TargetLikelihood | None,
    longest: int,
) -> Tensor:
    tokens_N, end = past.tokens_N, len(past.tokens_N)
    # The last token is never read; the unroll treats its feature as padding.
    features_NF = torch.cat([past.features_NF.float(), past.features_NF.new_zeros(1, past.features_NF.shape[1])])
    unroll = DraftUnroll(draft, embeddings_VH, tokens_N[None], features_NF[None])
    draft_id_V = draft.t2d.cumsum(0) - 1
    found = torch.zeros(len(roots), longest, dtype=torch.float64)
    live_A = torch.arange(len(roots))
    hidden = unroll.first(torch.zeros_like(roots), roots - 1)
    for depth in range(longest):
        at_A = roots[live_A] + depth + 1
        inside_A = at_A < end
        committed_A = tokens_N[at_A.clamp_max(end - 1)]
        logits = draft.logits(hidden)
        if likelihood is None:
            accepted_A = (draft.to_target_ids(logits.argmax(-1)) == committed_A).double()
        else:
            sampling = past.sampling
            probs = sampling_probs(logits, sampling.temperature, sampling.top_p, sampling.top_k)
            row_A = (at_A - past.prompt).clamp_max(len(likelihood.probs_R) - 1)
            own_q_A, q_Ak = (
                torch.where(draft.t2d[ids], probs.gather(-1, draft_id_V[ids].clamp_min(0)), 0).double()
                for ids in (committed_A[:, None], past.teacher.ids[row_A])
            )
            p_A, p_Ak = likelihood.probs_R[row_A], likelihood.recorded_Rk[row_A]
            accepted_A = coupled_acceptance(p_A, p_Ak, own_q_A[:, 0], q_Ak).clamp_max(1)
        found[live_A, depth] = torch.where(inside_A, accepted_A, 0)
        (on,) = (found[live_A, depth] > 0).nonzero(as_tuple=True)
        if depth + 1 == longest or not len(on):
            break
        live_A = live_A[on]
        hidden = unroll.advance(on, committed_A[on])
    return found
