"""The probability that serving accepts each token of the chains that a draft proposes along a past request.

A chain starts at a root, a token of the answer, from the draft's state after it: the target's features of the tokens
before the root, and the root itself, as in ``serving.engines.builtin.eagle_drafter``. Along the chain the draft reads
the committed tokens, which as far as the chain is accepted are its own.

**Greedy.** The chain consists of the draft's most likely tokens. A token is accepted if it is the committed one.

**Sampled.** Target and draft choose by the same noise. A token is accepted with the probability that the draft chose
it, given that it was generated (``trainer.objective.sampled_acceptance``). The noise of a position is independent of
that of others, so it is exact at every depth.

Shapes: N tokens of the request, R roots, K longest draft, A live chains, F feature width, k teacher width, V target
vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from schemas.speculator.draft_context import count_skipped
from schemas.speculator.network import EagleDraft
from trainer.objective.sampled_acceptance import coupled_acceptance, read_choice_probs
from trainer.objective.simulated_acceptance import F64
from trainer.objective.training_time_test import DraftUnroll
from trainer.replay.past_requests import PastRequest

ROOTS_PER_UNROLL = 512
"""Chains that are computed together; bounds the memory of a long request."""


@torch.inference_mode()
def acceptance_probabilities(
    draft: EagleDraft, embeddings_VH: Tensor, past: PastRequest, longest: int, context_tokens: int | None = None
) -> F64:
    """Return [R, K]: the probability that the draft's token at each depth is accepted, given the ones before it.

    Row i is the root at ``past.prompt + i``; the last token of the request is no root. Values past the end are 0. Each
    request is computed alone, so that its figures do not depend on other requests.

    Args:
        draft: The draft.
        embeddings_VH: The target's token embeddings.
        past: The request.
        longest: K.
        context_tokens: ``train.context_tokens``, to which nodes limit what the draft reads of a prompt; None for all.
    """
    skipped = 0 if context_tokens is None else count_skipped(past.prompt, context_tokens)
    past = replace(
        past, tokens_N=past.tokens_N[skipped:], features_NF=past.features_NF[skipped:], prompt=past.prompt - skipped
    )
    roots = torch.arange(past.prompt, len(past.tokens_N) - 1)
    found = torch.zeros(len(roots), longest, dtype=torch.float64)
    for start in range(0, len(roots), ROOTS_PER_UNROLL):
        group = roots[start : start + ROOTS_PER_UNROLL]
        found[group - past.prompt] = _unroll(draft, embeddings_VH, past, group, longest)
    probs_RK: F64 = found.numpy()
    return probs_RK


def _unroll(draft: EagleDraft, embeddings_VH: Tensor, past: PastRequest, roots: Tensor, longest: int) -> Tensor:
    tokens_N, end = past.tokens_N, len(past.tokens_N)
    # The last token is never read; the unroll treats its feature as padding.
    features_NF = torch.cat([past.features_NF.float(), past.features_NF.new_zeros(1, past.features_NF.shape[1])])
    unroll = DraftUnroll(draft, embeddings_VH, tokens_N[None], features_NF[None])
    found = torch.zeros(len(roots), longest, dtype=torch.float64)
    live_A = torch.arange(len(roots))
    hidden = unroll.first(torch.zeros_like(roots), roots - 1)
    for depth in range(longest):
        at_A = roots[live_A] + depth + 1
        inside_A = at_A < end
        committed_A = tokens_N[at_A.clamp_max(end - 1)]
        logits = draft.logits(hidden)
        if past.sampling.greedy:
            accepted_A = (draft.to_target_ids(logits.argmax(-1)) == committed_A).double()
        else:
            teacher = past.teacher[(at_A - past.prompt).clamp_max(len(past.teacher.ids) - 1)]
            accepted_A = coupled_acceptance(*read_choice_probs(draft, logits, teacher, committed_A, past.sampling))
        found[live_A, depth] = torch.where(inside_A, accepted_A, 0)
        (on,) = (found[live_A, depth] > 0).nonzero(as_tuple=True)
        if depth + 1 == longest or not len(on):
            break
        live_A = live_A[on]
        hidden = unroll.advance(on, committed_A[on])
    return found
