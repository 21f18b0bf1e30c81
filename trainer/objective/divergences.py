"""Divergences of the draft's distribution q from the target's distribution p at one position.

All are zero where q equals p. They differ in the errors that a draft of limited capacity keeps.

- ``kl``: KL(p || q). Covers everything the target may generate; the usual choice (EAGLE-3, Aurora).
- ``reverse-kl``: KL(q || p). Concentrates on the target's likely tokens. The recorded p has no tail, so it is
  smoothed: ``TAIL_MASS`` is spread evenly over the draft vocabulary.
- ``tv``: 1 - sum min(p, q), the probability that speculative sampling rejects a token drawn from q (Leviathan et al.,
  arXiv 2211.17192, section 3.3). Its gradient vanishes where q is far from p, as for a random draft.
- ``lk``: w KL(p || q) + (1 - w) (1 - sum min(p, q)), where w = exp(-``LK_RATE`` x mean acceptance) falls as the draft
  improves: a hybrid as in LK losses (Samarin et al., arXiv 2602.23881).

Shapes: A positions, k teacher width, D draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from schemas.settings import Objective

TAIL_MASS = 0.01
LK_RATE = 3.0

Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From logits [A, D], teacher ids [A, k] and teacher probabilities [A, k], which sum to one, to [A]."""


def forward_kl(logits_AD: Tensor, ids_Ak: Tensor, probs_Ak: Tensor) -> Tensor:
    """Return KL(p || q)."""
    kl_A: Tensor = _ForwardKl.apply(logits_AD, ids_Ak, probs_Ak)  # type: ignore[no-untyped-call]
    return kl_A


class _ForwardKl(Function):
    """``forward_kl`` with its gradient q - p written out; torch's own needs twice as many passes over [A, D]."""

    @staticmethod
    def forward(ctx: Any, logits_AD: Tensor, ids_Ak: Tensor, probs_Ak: Tensor) -> Tensor:
        top_A1 = logits_AD.amax(dim=-1, keepdim=True)
        q_AD = (logits_AD - top_A1).exp_()
        total_A1 = q_AD.sum(dim=-1, keepdim=True)
        ctx.save_for_backward(q_AD, total_A1, ids_Ak, probs_Ak)
        expected_A = (probs_Ak * logits_AD.gather(-1, ids_Ak)).sum(dim=-1)
        entropy_A: Tensor = torch.special.entr(probs_Ak).sum(dim=-1)
        return (top_A1 + total_A1.log()).squeeze(-1) - expected_A - entropy_A

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_A: Tensor) -> tuple[Tensor, None, None]:
        q_AD, total_A1, ids_Ak, probs_Ak = ctx.saved_tensors
        gradient_A1 = gradient_A[:, None]
        return (q_AD * (gradient_A1 / total_A1)).scatter_add_(-1, ids_Ak, -gradient_A1 * probs_Ak), None, None


def reverse_kl(logits_AD: Tensor, ids_Ak: Tensor, probs_Ak: Tensor) -> Tensor:
    """Return KL(q || p), with p smoothed by ``TAIL_MASS``."""
    logq_AD = logits_AD.log_softmax(dim=-1)
    q_AD = logq_AD.exp()
    floor = TAIL_MASS / logits_AD.shape[-1]
    log_ratio_Ak = ((1 - TAIL_MASS) * probs_Ak + floor).log() - math.log(floor)
    inside_A = (q_AD.gather(-1, ids_Ak) * log_ratio_Ak).sum(dim=-1)
    return (q_AD * logq_AD).sum(dim=-1) - inside_A - math.log(floor)


def total_variation(logits_AD: Tensor, ids_Ak: Tensor, probs_Ak: Tensor) -> Tensor:
    """Return 1 - sum min(p, q)."""
    return 1 - _acceptance(logits_AD, ids_Ak, probs_Ak)


def lk_hybrid(logits_AD: Tensor, ids_Ak: Tensor, probs_Ak: Tensor) -> Tensor:
    """Return the mix of ``forward_kl`` and ``total_variation``, weighted by the mean acceptance of the positions."""
    acceptance_A = _acceptance(logits_AD, ids_Ak, probs_Ak)
    w = (-LK_RATE * acceptance_A.detach().mean()).exp()
    return w * forward_kl(logits_AD, ids_Ak, probs_Ak) + (1 - w) * (1 - acceptance_A)


DIVERGENCES: dict[Objective, Divergence] = {
    "kl": forward_kl,
    "reverse-kl": reverse_kl,
    "tv": total_variation,
    "lk": lk_hybrid,
}

POSITIONWISE: frozenset[Objective] = frozenset({"kl", "reverse-kl", "tv"})
"""Divergences whose value at a position does not depend on the other positions."""


def _acceptance(logits_AD: Tensor, ids_Ak: Tensor, probs_Ak: Tensor) -> Tensor:
    q_Ak = (logits_AD.gather(-1, ids_Ak) - logits_AD.logsumexp(dim=-1, keepdim=True)).exp()
    return torch.minimum(probs_Ak, q_Ak).sum(dim=-1)
