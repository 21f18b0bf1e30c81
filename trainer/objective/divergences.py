"""What a draft is taught at one position: the divergence of its distribution q from the target's p.

All of them are zero where q equals p; they differ in what a draft that is too small to get there gives up.

- ``kl``: KL(p || q). Covers what the target may say; the usual choice (EAGLE-3, Aurora).
- ``reverse-kl``: KL(q || p). Keeps to what the target surely says. The recorded p has no tail, so it is smoothed:
  ``TAIL`` of the mass is spread evenly over the draft vocabulary.
- ``tv``: 1 - sum min(p, q), the probability that speculative sampling rejects a token drawn from q (Leviathan et al.,
  arXiv 2211.17192, section 3.3). Its gradient vanishes where q is far from p, as that of a random draft is.
- ``lk``: w KL(p || q) + (1 - w) (1 - sum min(p, q)), where w = exp(-``LK_RATE`` x mean acceptance) falls as the draft
  gets better: a hybrid as in LK losses (Samarin et al., arXiv 2602.23881).

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

TAIL = 0.01
LK_RATE = 3.0

Divergence = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of draft scores [A, D], teacher ids [A, k] and their probabilities [A, k], which sum to one: [A]."""


def forward_kl(logits_AD: Tensor, ids_Ak: Tensor, probs_Ak: Tensor) -> Tensor:
    """KL(p || q)."""
    found: Tensor = _ForwardKl.apply(logits_AD, ids_Ak, probs_Ak)  # type: ignore[no-untyped-call]
    return found


class _ForwardKl(Function):
    """``forward_kl`` with its gradient q - p written out: torch's own passes twice as often over [A, D]."""

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
    """KL(q || p), with p smoothed by ``TAIL``."""
    logq_AD = logits_AD.log_softmax(dim=-1)
    q_AD = logq_AD.exp()
    floor = TAIL / logits_AD.shape[-1]
    log_ratio_Ak = ((1 - TAIL) * probs_Ak + floor).log() - math.log(floor)
    inside_A = (q_AD.gather(-1, ids_Ak) * log_ratio_Ak).sum(dim=-1)
    return (q_AD * logq_AD).sum(dim=-1) - inside_A - math.log(floor)


def total_variation(logits_AD: Tensor, ids_Ak: Tensor, probs_Ak: Tensor) -> Tensor:
    """1 - sum min(p, q)."""
    return 1 - _acceptance(logits_AD, ids_Ak, probs_Ak)


def likely_kept(logits_AD: Tensor, ids_Ak: Tensor, probs_Ak: Tensor) -> Tensor:
    """The hybrid of ``forward_kl`` and ``total_variation``, weighed by the mean acceptance of these positions."""
    acceptance_A = _acceptance(logits_AD, ids_Ak, probs_Ak)
    w = (-LK_RATE * acceptance_A.detach().mean()).exp()
    return w * forward_kl(logits_AD, ids_Ak, probs_Ak) + (1 - w) * (1 - acceptance_A)


DIVERGENCES: dict[Objective, Divergence] = {
    "kl": forward_kl,
    "reverse-kl": reverse_kl,
    "tv": total_variation,
    "lk": likely_kept,
}

OF_EACH_ALONE: frozenset[Objective] = frozenset({"kl", "reverse-kl", "tv"})
"""Those of which a position's value is the same whatever positions are beside it."""


def _acceptance(logits_AD: Tensor, ids_Ak: Tensor, probs_Ak: Tensor) -> Tensor:
    q_Ak = (logits_AD.gather(-1, ids_Ak) - logits_AD.logsumexp(dim=-1, keepdim=True)).exp()
    return torch.minimum(probs_Ak, q_Ak).sum(dim=-1)
