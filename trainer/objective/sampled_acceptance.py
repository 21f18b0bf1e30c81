"""The acceptance of a draft token of a sampled request, from the recorded probabilities of the target.

p is the target's distribution under the request's sampling, q the draft's, x the token that the target chose.

**Rejection sampling** (Leviathan et al., arXiv 2211.17192), the rule of SGLang and vLLM: a token that was drawn from q
is accepted with probability min(1, p / q). So the next draft token is accepted with probability sum_v min(p(v), q(v)),
and with min(1, q(x) / p(x)) given x.

**Coupled choice** (Daliri et al., arXiv 2408.07978), the rule of the built-in engine: target and draft choose by the
same noise, as in ``serving.engines.builtin.noise``, and a token is accepted if both choose it. Both choose x with
probability 1 / sum_v max(p(v) / p(x), q(v) / q(x)), and the target chooses x with probability p(x). The quotient is the
probability that the draft chose x, given x.

**Unrecorded probabilities.** Only the target's top k are logged. The tail of p is treated as tokens as likely as the
last recorded one, which at temperature 1 is exact for the sum; with ``top_k`` up to the recorded number there is no
tail. A chosen token that is not among the recorded ones counts as likely as the last of them, and the draft is taken to
put its remaining mass on other tokens of the tail than the target does: an acceptance probability is underestimated,
never overestimated.

Shapes: A positions, k teacher width, D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from schemas.speculator.acceptance import sampling_probs
from schemas.speculator.network import EagleDraft
from trainer.data.samples import RequestSampling, Teacher


class ChoiceProbs(NamedTuple):
    """Probabilities of the token that the target chose, [A], and of the recorded ones, [A, k]; float64."""

    own_p_A: Tensor
    p_Ak: Tensor
    own_q_A: Tensor
    q_Ak: Tensor


class RejectionAcceptance(NamedTuple):
    """Probabilities [A] that the next draft token is accepted."""

    rate_A: Tensor
    """Whatever the target chooses."""
    given_A: Tensor
    """Given the token that it chose."""


def read_choice_probs(
    draft: EagleDraft, logits_AD: Tensor, teacher: Teacher, chosen_A: Tensor, sampling: RequestSampling
) -> ChoiceProbs:
    """Return the probabilities that both acceptance rules compare.

    Args:
        draft: Defines the draft vocabulary, outside of which its probability is zero.
        logits_AD: The draft's logits.
        teacher: [A, k] the target's recorded distributions.
        chosen_A: The tokens that the target chose; ids of the target vocabulary.
        sampling: Parameters of the request, not greedy.
    """
    p_Ak, least_A = apply_sampling(teacher, sampling)
    own_p_A = torch.where(teacher.ids == chosen_A[:, None], p_Ak, 0).sum(dim=-1)
    q_AD = sampling_probs(logits_AD, sampling.temperature, sampling.top_p, sampling.top_k)
    draft_id_V = (draft.t2d.cumsum(0) - 1).clamp_min(0)

    def draft_probs(ids: Tensor) -> Tensor:
        return torch.where(draft.t2d[ids], q_AD.gather(-1, draft_id_V[ids]), 0).double()

    own_q_A = draft_probs(chosen_A[:, None]).squeeze(-1)
    return ChoiceProbs(torch.where(own_p_A > 0, own_p_A, least_A), p_Ak, own_q_A, draft_probs(teacher.ids))


def rejection_acceptance(own_p_A: Tensor, p_Ak: Tensor, own_q_A: Tensor, q_Ak: Tensor) -> RejectionAcceptance:
    """Return the acceptance by rejection sampling, from probabilities as in ``ChoiceProbs``."""
    return RejectionAcceptance(torch.minimum(p_Ak, q_Ak).sum(dim=-1), (own_q_A / own_p_A).clamp_max(1))


def coupled_acceptance(own_p_A: Tensor, p_Ak: Tensor, own_q_A: Tensor, q_Ak: Tensor) -> Tensor:
    """Return [A] the probability that the draft chose the token that the target chose, from ``ChoiceProbs``."""
    p_tail_A, q_tail_A = (1 - p_Ak.sum(dim=-1)).clamp_min(0), (1 - q_Ak.sum(dim=-1)).clamp_min(0)
    scaled_A = torch.maximum(p_Ak * own_q_A[:, None], q_Ak * own_p_A[:, None]).sum(dim=-1)
    scaled_A = scaled_A + p_tail_A * own_q_A + q_tail_A * own_p_A
    return (own_q_A / scaled_A.clamp_min(torch.finfo(scaled_A.dtype).tiny)).clamp_max(1)


def apply_sampling(teacher: Teacher, sampling: RequestSampling) -> tuple[Tensor, Tensor]:
    """Apply temperature, top-k and nucleus sampling to the recorded distributions.

    Returns:
        [A, k] float64, 0 where a token is excluded, and [A] the smallest probability of a token that is not.
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
    """Return [A, 1]: the log-weight of all unrecorded tokens after temperature; -inf where top-k excludes them."""
    if 0 < sampling.top_k <= logprobs.shape[-1]:
        return torch.full_like(logprobs[:, :1], -torch.inf)
    missing = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(0)
    # A batch pads records of different widths with -inf.
    last = logprobs.masked_fill(logprobs == -torch.inf, torch.inf).amin(-1, keepdim=True)
    return missing.log() + last * (1 / sampling.temperature - 1)
