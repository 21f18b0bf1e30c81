"""The acceptance rule: which drafted tokens the target keeps, without changing what it would have said.

A draft is a tree of tokens with parent links (``schemas.draft_tree``); a chain is the tree without branches. The
rule walks
from the root: at each node that was kept it asks the node's children in order, goes on at the first that is kept, and
where none is the target says its own token, the bonus.

Greedy: a drafted token is kept while it equals the target's argmax. Sampled: speculative sampling (Leviathan et al.,
arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318), over several children as in SpecInfer (Miao et al., arXiv
2305.09781, section 4.3).

Shapes: m drafted tokens, T rows, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from schemas.trace.record import ROOT


class Verdict(NamedTuple):
    """The nodes that were kept, the root's child first, and the target's own token after the last of them."""

    path: tuple[int, ...]
    bonus: int


class Rows(Protocol):
    """Distributions [V] by row: a tensor [T, V], or rows that are computed when they are asked for."""

    def __getitem__(self, row: int, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class SampledRows:
    """``sampling_probs`` row by row: the rule comes to one row more than it keeps tokens, out of all in a tree.

    On the processor, where chance is drawn whatever computes the scores: a seed means the same everywhere.
    """

    logits_TV: Tensor
    temperature: float
    top_p: float
    top_k: int = 0

    def __getitem__(self, row: int, /) -> Tensor:
        return sampling_probs(self.logits_TV[row : row + 1].cpu(), self.temperature, self.top_p, self.top_k)[0]


def accept_greedy(tokens: Sequence[int], parents: Sequence[int], argmax: Sequence[int]) -> Verdict:
    """Keep the path that the target would have chosen, as far as the draft has it.

    Of siblings with the same token the first is followed, which costs length at most and never changes the output.

    Args:
        tokens: [m] the drafted tokens.
        parents: [m] the parent of each.
        argmax: [1 + m] the target's choice after the root and after each node.
    """
    at, path = ROOT, []
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent == at and token == argmax[1 + at]:
            at = node
            path.append(node)
    return Verdict(tuple(path), argmax[1 + at])


def accept_sampled(
    tokens: Sequence[int],
    parents: Sequence[int],
    target_probs_mV: Rows,
    generator: torch.Generator | None,
    draft_probs_mV: Tensor | None = None,
) -> Verdict:
    """Keep drafted tokens so that what is said has the target's distribution.

    A child x that was drawn from q is kept with probability min(1, p(x) / q(x)); if it is not, its later siblings and
    the bonus are judged by the normalised (p - q)+ in place of p. A child that the draft chose without chance, such as
    one of its k likeliest tokens (EAGLE-2, arXiv 2406.16858), is the case of a q that has all its mass on x: kept with
    probability p(x), and if not, p goes on without x.

    Why candidates chosen without chance are exact in any tree: with probability p(x) the node says x and otherwise it
    goes on with p given "not x", so by induction over the children it says a token distributed as p. The tree was fixed
    before any of this chance was drawn, so the same holds below the child that was kept, given the tokens up to it.

    Siblings with the same token are harmless: chosen without chance, the second has no mass left; drawn, each is judged
    by its own q.

    Args:
        tokens: [m] the drafted tokens.
        parents: [m] the parent of each.
        target_probs_mV: [1 + m, V] the target's distributions after the root and each node: ``SampledRows``.
        generator: Source of the request's randomness, after the draft has drawn what it draws.
        draft_probs_mV: [m, V] the distribution that each token was drawn from, given the siblings before it; None for
            a draft without chance. A tree of drawn tokens may not be pruned by what was drawn.
    """
    at, path, p = ROOT, [], target_probs_mV[0]
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent != at:
            continue
        q = None if draft_probs_mV is None else draft_probs_mV[node]
        u = torch.rand((), generator=generator, device=p.device)
        if u * (1 if q is None else q[token]) < p[token]:
            at, p = node, target_probs_mV[1 + node]
            path.append(node)
        else:
            p = _after_rejection(p, token, q)
    return Verdict(tuple(path), draw(p, generator))


def sampling_probs(logits_TV: Tensor, temperature: float, top_p: float, top_k: int = 0) -> Tensor:
    """Distributions [T, V] to draw from: temperature, then top-k, then nucleus, as vLLM and transformers do.

    The nucleus is the smallest set of the likeliest tokens whose share of what top-k left reaches ``top_p``. Tokens as
    likely as the last one kept stay too, in both: which of them would go is an accident of the sort.

    Args:
        logits_TV: [T, V] scores.
        temperature: Positive; a greedy request does not come here.
        top_p: Share of the mass to keep, above 0; 1 keeps all.
        top_k: Tokens to keep; 0 keeps all.
    """
    probs_TV = torch.softmax(logits_TV.float() / temperature, dim=-1)
    few = 0 < top_k < probs_TV.shape[-1]
    if top_p >= 1 and not few:
        return probs_TV
    ordered_TV = _descending(probs_TV)
    if few:
        least_T1 = ordered_TV[:, top_k - 1 : top_k]
        ordered_TV = ordered_TV.masked_fill(ordered_TV < least_T1, 0)
    if top_p < 1:
        mass_TV = ordered_TV.cumsum(dim=-1, dtype=torch.float64)
        least_T1 = ordered_TV.gather(-1, torch.searchsorted(mass_TV, top_p * mass_TV[:, -1:]))
    kept_TV = probs_TV.masked_fill(probs_TV < least_T1, 0)
    return kept_TV / kept_TV.sum(dim=-1, keepdim=True)


def draw(probs_V: Tensor, generator: torch.Generator | None) -> int:
    """One token by inversion of the cumulated distribution, which takes a thirtieth of ``torch.multinomial``'s time.

    Raises:
        FloatingPointError: the probabilities are not finite.
    """
    mass_V = probs_V.cumsum(dim=-1, dtype=torch.float64)
    u = torch.rand((), generator=generator, device=probs_V.device, dtype=torch.float64)
    # The first entry above u * total has mass of its own, so a token that is excluded is never drawn.
    token = int(torch.searchsorted(mass_V, u * mass_V[-1], right=True))
    if token == len(probs_V):
        raise FloatingPointError("the probabilities to draw from are not finite: the model's scores are broken")
    return token


def _after_rejection(p_V: Tensor, token: int, q_V: Tensor | None) -> Tensor:
    if q_V is None:
        residual_V = p_V.clone()
        residual_V[token] = 0
    else:
        residual_V = (p_V - q_V).clamp_min_(0)
    total = residual_V.sum()
    # p equals q up to rounding: any rejection was itself a rounding error, and p is the limit of the residual.
    return residual_V / total if total > 0 else p_V


def _descending(probs_TV: Tensor) -> Tensor:
    """The values of each row, largest first."""
    if probs_TV.is_cpu:
        # NumPy sorts bare values with vector instructions; torch, which moves indices too, takes twenty times as long.
        return torch.from_numpy(np.sort(probs_TV.numpy(), axis=-1)).flip(-1)
    return probs_TV.sort(dim=-1, descending=True).values
