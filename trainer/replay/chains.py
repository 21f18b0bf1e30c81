"""How likely serving keeps each token of the chains that a draft proposes along a request of the past.

A chain starts at a root, a token of the answer, from the draft's state after it: the target's features of the tokens
before and the root itself, as ``serving.engines.builtin.drafter`` follows them. Along it the draft is given the
committed
tokens, which as far as a chain is kept are its own.

**Greedy.** The chain is the draft's likeliest token after each other. A token is kept if it is the committed one.

**Sampled.** The chain is drawn from the draft's distribution q, and a token is kept with probability min(1, p / q). A
token x that was said comes from the draft with probability min(p(x), q(x)) and has probability p(x) in all (Leviathan
et al., arXiv 2211.17192, appendix A.1), so given that x was said, it was a kept one with chance min(1, q(x) / p(x)).
Averaged over what may be said that is the sum of min(p, q); given the tokens it is exact at every depth.

**What is not recorded.** Of p only the target's top k are logged. Its tail is taken as tokens as likely as the last
recorded one, which at temperature 1 is exact for the sum; with ``top_k`` at most that many there is no tail. A said
token that is not among the recorded ones counts as likely as the last of them: its chance comes out too low, never too
high, and such tokens are counted.

Shapes: N tokens of the request, R roots, K longest draft, A chains that go on, k teacher width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from schemas.speculator.acceptance import sampling_probs
from schemas.speculator.network import EagleDraft
from trainer.data.samples import Teacher
from trainer.objective.unroll import Unroll
from trainer.replay.past_requests import Past, Sampling
from trainer.replay.verify_steps import F64

ROOTS = 512
"""Chains that are computed together: bounds the memory of a long request."""


class Said(NamedTuple):
    """What the target gave the tokens that were said."""

    probs_R: Tensor
    """Under the request's sampling."""
    outside: int
    """How many were not among the recorded ones."""


@torch.inference_mode()
def chances(draft: EagleDraft, embeddings_VH: Tensor, past: Past, longest: int) -> F64:
    """[R, K] chance that the draft's token at each depth is kept, given those before it; 0 past the end.

    Row i is the root at ``past.prompt + i``; the last token of the request is no root. One request at a time, so that
    its figures do not depend on its company.
    """
    roots = torch.arange(past.prompt, len(past.tokens_N) - 1)
    said = None if past.sampling.greedy else likelihood(past).probs_R
    found = torch.zeros(len(roots), longest, dtype=torch.float64)
    for start in range(0, len(roots), ROOTS):
        some = roots[start : start + ROOTS]
        rows = some - past.prompt
        found[rows] = _chances(draft, embeddings_VH, past, some, said, longest)
    chance_RK: F64 = found.numpy()
    return chance_RK


def likelihood(past: Past) -> Said:
    """The target's probability of each token of the answer under the request's sampling."""
    probs_Rk, least_R = sampled(past.teacher, past.sampling)
    said_R1 = past.tokens_N[past.prompt :, None]
    hit_Rk = past.teacher.ids == said_R1
    own_R = torch.where(hit_Rk, probs_Rk, 0).sum(-1)
    return Said(torch.where(own_R > 0, own_R, least_R), int((~hit_Rk.any(-1)).sum()))


def sampled(teacher: Teacher, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The recorded distributions as tokens were drawn from them: temperature, top-k, nucleus.

    Returns:
        [R, k] float64, 0 where a token was excluded, and [R] the least probability of one that was not.
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
        # A nucleus that reaches beyond what is recorded has the mass that was asked for, as far as one can tell.
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(sampling.top_p)
    return weights, weights.masked_fill(weights == 0, torch.inf).amin(-1)


def _tail(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """[R, 1] log-weight, after temperature, of all that was not recorded; nothing where top-k leaves none of it."""
    if 0 < sampling.top_k <= logprobs.shape[-1]:
        return torch.full_like(logprobs[:, :1], -torch.inf)
    missing = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(0)
    return missing.log() + logprobs[:, -1:] * (1 / sampling.temperature - 1)


def _chances(
    draft: EagleDraft, embeddings_VH: Tensor, past: Past, roots: Tensor, said: Tensor | None, longest: int
) -> Tensor:
    tokens_N, end = past.tokens_N, len(past.tokens_N)
    # The last token is never read: the unroll takes its place among the features as it takes padding.
    features_NF = torch.cat([past.features_NF.float(), past.features_NF.new_zeros(1, past.features_NF.shape[1])])
    unroll = Unroll(draft, embeddings_VH, tokens_N[None], features_NF[None])
    number_V = draft.t2d.cumsum(0) - 1
    found = torch.zeros(len(roots), longest, dtype=torch.float64)
    alive = torch.arange(len(roots))
    hidden = unroll.first(torch.zeros_like(roots), roots - 1)
    for depth in range(longest):
        at = roots[alive] + depth + 1
        inside = at < end
        committed = tokens_N[at.clamp_max(end - 1)]
        logits = draft.logits(hidden)
        if said is None:
            kept = (draft.to_target_ids(logits.argmax(-1)) == committed).double()
        else:
            sampling = past.sampling
            probs = sampling_probs(logits, sampling.temperature, sampling.top_p, sampling.top_k)
            own = probs.gather(-1, number_V[committed].clamp_min(0)[:, None])[:, 0].double()
            of_target = said[(at - past.prompt).clamp_max(len(said) - 1)]
            kept = torch.where(draft.t2d[committed], own / of_target, 0).clamp_max(1)
        found[alive, depth] = torch.where(inside, kept, 0)
        (on,) = (found[alive, depth] > 0).nonzero(as_tuple=True)
        if depth + 1 == longest or not len(on):
            break
        alive = alive[on]
        hidden = unroll.advance(on, committed[on])
    return found
