"""The acceptance rule: which draft tokens are kept, so that the output has the target's distribution.

A draft is a tree of tokens with parent links (``schemas.draft_tree``); a chain is a tree without branches. The rule
walks down from the root. At each accepted node it tests the node's children in order and continues at the first
accepted one. If it accepts none, the target chooses a token itself, the bonus token.

Greedy: a draft token is accepted if it equals the target's argmax. Sampled: speculative sampling (Leviathan et al.,
arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318), with several children as in SpecInfer (Miao et al., arXiv
2305.09781, section 4.3).

Shapes: m draft tokens, T rows, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from schemas.trace.record import ROOT

MIN_TEMPERATURE = 1e-6
"""Decoding below it is greedy: the quotients of the logits would leave the range of float32."""


class Verdict(NamedTuple):
    """The accepted nodes, from the root's child on, and the bonus token after the last of them."""

    path: tuple[int, ...]
    bonus: int


class ProbabilityRows(Protocol):
    """Logits or probability distributions [V] by row: a tensor [T, V], or rows computed on access."""

    def __getitem__(self, row: int, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Rows of ``sampling_probs``, computed on access: of a tree, the rule reads one row more than it accepts tokens.

    Rows are computed on the CPU, where random numbers are drawn, so that a seed gives the same output on every device.
    """

    logits_TV: ProbabilityRows
    temperature: float
    top_p: float
    top_k: int = 0

    def __getitem__(self, row: int, /) -> Tensor:
        return sampling_probs(self.logits_TV[row][None].cpu(), self.temperature, self.top_p, self.top_k)[0]


class TokenRows(Protocol):
    """The target's token by row: a list, or tokens computed on access."""

    def __getitem__(self, row: int, /) -> int: ...


def accept_greedy(tokens: Sequence[int], parents: Sequence[int], argmax: TokenRows) -> Verdict:
    """Accept the longest path of draft tokens that equal the target's greedy choices.

    Of siblings with the same token the rule follows the first. This can shorten the path but never changes the output.

    Args:
        tokens: [m] draft tokens.
        parents: [m] parent of each node.
        argmax: [1 + m] the target's greedy choice after the root and after each node; only the rows of the path are
            read, in order and once.
    """
    current, path, choice = ROOT, [], argmax[0]
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent == current and token == choice:
            current, choice = node, argmax[1 + node]
            path.append(node)
    return Verdict(tuple(path), choice)


def accept_sampled(
    tokens: Sequence[int],
    parents: Sequence[int],
    target_probs_mV: ProbabilityRows,
    generator: torch.Generator | None,
    draft_probs_mV: Sequence[Tensor | None] | Tensor | None = None,
) -> Verdict:
    """Accept draft tokens so that the output has the target's distribution.

    A child x drawn from q is accepted with probability min(1, p(x) / q(x)). If it is rejected, the normalized (p - q)+
    replaces p for its later siblings and the bonus token. A child that the draft chose deterministically, such as one
    of its k most likely tokens (EAGLE-2, arXiv 2406.16858), is the case of a q with all mass on x: it is accepted with
    probability p(x), and a rejection removes x from p.

    Deterministic candidates are exact in any tree: with probability p(x) the output is x, otherwise the rule continues
    with p given "not x", so by induction over the children the output is distributed as p. The tree was fixed before
    any of these random numbers was drawn, so the same holds below the accepted child, given the tokens up to it.

    Siblings with the same token cause no error: if deterministic, the second has no mass left; if drawn, each is tested
    against its own q.

    Args:
        tokens: [m] draft tokens.
        parents: [m] parent of each node.
        target_probs_mV: [1 + m, V] the target's distributions after the root and each node: ``SampledRows``.
        generator: Random generator of the request, in its state after drafting.
        draft_probs_mV: [m, V] distribution that each token was drawn from, given its earlier siblings; None for a
            deterministic token or draft. Drawn tokens must not be pruned depending on the tokens. Deterministic tokens
            may depend on drawn ones, because they are exact in any tree.
    """
    current, path, p = ROOT, [], target_probs_mV[0]
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent != current:
            continue
        q = None if draft_probs_mV is None else draft_probs_mV[node]
        u = torch.rand((), generator=generator, device=p.device)
        if u * (1 if q is None else q[token]) < p[token]:
            current, p = node, target_probs_mV[1 + node]
            path.append(node)
        else:
            p = _after_rejection(p, token, q)
    return Verdict(tuple(path), draw_token(p, generator))


def sampling_probs(logits_TV: Tensor, temperature: float, top_p: float, top_k: int = 0) -> Tensor:
    """Return the sampling distributions [T, V]: temperature, then top-k, then top-p, as in vLLM and transformers.

    Top-p keeps the smallest set of the most likely tokens whose share of the mass after top-k reaches ``top_p``. Top-k
    and top-p also keep all tokens that are as likely as the last one kept: the order among them depends on the sort.

    Args:
        logits_TV: [T, V] logits.
        temperature: At least ``MIN_TEMPERATURE``, which replaces lower values; greedy requests use ``accept_greedy``.
        top_p: Probability mass to keep, above 0; 1 keeps all.
        top_k: Tokens to keep; 0 keeps all.
    """
    probs_TV = torch.softmax(logits_TV.float() / max(temperature, MIN_TEMPERATURE), dim=-1)
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


def draw_token(probs_V: Tensor, generator: torch.Generator | None) -> int:
    """Draw one token by inverting the cumulative distribution, which takes a thirtieth of ``torch.multinomial``'s time.

    Raises:
        FloatingPointError: the probabilities are not finite.
    """
    mass_V = probs_V.cumsum(dim=-1, dtype=torch.float64)
    u = torch.rand((), generator=generator, device=probs_V.device, dtype=torch.float64)
    # The first entry above u * total has mass, so an excluded token is never drawn.
    token = int(torch.searchsorted(mass_V, u * mass_V[-1], right=True))
    if token == len(probs_V):
        raise FloatingPointError("the sampling probabilities are not finite: the model's logits are invalid")
    return token


def _after_rejection(p_V: Tensor, token: int, q_V: Tensor | None) -> Tensor:
    if q_V is None:
        residual_V = p_V.clone()
        residual_V[token] = 0
    else:
        residual_V = (p_V - q_V).clamp_min_(0)
    total = residual_V.sum()
    # p equals q up to rounding: the rejection itself was a rounding error, and p is the limit of the residual.
    return residual_V / total if total > 0 else p_V


def _descending(probs_TV: Tensor) -> Tensor:
    """Return the values of each row in descending order."""
    if probs_TV.is_cpu:
        # NumPy sorts values with vector instructions; torch also sorts indices and takes twenty times as long.
        return torch.from_numpy(np.sort(probs_TV.numpy(), axis=-1)).flip(-1)
    return probs_TV.sort(dim=-1, descending=True).values
