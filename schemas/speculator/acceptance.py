"""The acceptance rule: which drafted tokens the target keeps, without changing what it would have said.

Greedy: a drafted token is kept while it equals the target's argmax. Sampled: speculative sampling (Leviathan et al.,
arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318): token x drawn from the draft's distribution q is kept
with probability min(1, p(x) / q(x)); at the first rejection the target's token is drawn from the normalised (p - q)+,
and after a chain that was kept whole from p.

Shapes: m drafted tokens, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """How many tokens of the chain were kept, and the target's own token after them."""

    accepted: int
    bonus: int


def accept_greedy(draft_tokens: Sequence[int], argmax: Sequence[int]) -> Verdict:
    """Keep the longest prefix that the target would have chosen.

    Args:
        draft_tokens: [m] the drafted chain.
        argmax: [m + 1] the target's choice after the root and after each drafted token.
    """
    accepted = 0
    while accepted < len(draft_tokens) and draft_tokens[accepted] == argmax[accepted]:
        accepted += 1
    return Verdict(accepted, argmax[accepted])


def accept_sampled(
    draft_tokens: Sequence[int], draft_probs_mV: Tensor, target_probs_mV: Tensor, generator: torch.Generator | None
) -> Verdict:
    """Keep drafted tokens by speculative sampling.

    Args:
        draft_tokens: [m] the chain, each token drawn from its row of ``draft_probs_mV``.
        draft_probs_mV: [m, V] the distributions that the chain was drawn from.
        target_probs_mV: [m + 1, V] the target's distributions after the root and each drafted token, with temperature
            and nucleus applied.
        generator: Source of the request's randomness.
    """
    for i, token in enumerate(draft_tokens):
        p, q = target_probs_mV[i], draft_probs_mV[i]
        u = torch.rand((), generator=generator, device=p.device)
        if u * q[token] < p[token]:
            continue
        residual = (p - q).clamp_min_(0)
        total = residual.sum()
        # p equals q up to rounding: any rejection was itself a rounding error, and p is the limit of the residual.
        return Verdict(i, _draw(residual / total if total > 0 else p, generator))
    return Verdict(len(draft_tokens), _draw(target_probs_mV[len(draft_tokens)], generator))


def sampling_probs(logits_TV: Tensor, temperature: float, top_p: float) -> Tensor:
    """Distributions [T, V] to draw from: temperature, then the smallest set of tokens whose mass reaches ``top_p``.

    ``temperature`` must be positive; a greedy request does not come here.
    """
    probs = torch.softmax(logits_TV.float() / temperature, dim=-1)
    if top_p >= 1:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    kept = torch.zeros_like(probs).scatter_(-1, order, ordered.masked_fill(outside, 0))
    return kept / kept.sum(dim=-1, keepdim=True)


def _draw(probs_V: Tensor, generator: torch.Generator | None) -> int:
    return int(torch.multinomial(probs_V, 1, generator=generator))
