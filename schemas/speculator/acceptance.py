"""The acceptance rule: which draft tokens are kept, so that the output is the target's own.

A draft is a tree of tokens with parent links (``schemas.draft_tree``); a chain is a tree without branches. The target
chooses one token after the root and after each node. The rule walks down from the root: it follows the child whose
token is the target's choice. Where there is none, the choice itself is the bonus token.

The target's choice depends on the tokens before it and on no draft. Greedy, it is the argmax. Sampled, it is the argmax
of p / E over noise E that belongs to the request's seed, the position and the token (``serving.engines.builtin.noise``;
drafter-invariant speculation, Daliri et al., arXiv 2408.07978). So the output is the same for every draft, and a token
is a sample of the target's distribution because its noise is independent of the tokens before it.

Shapes: m draft tokens, T rows, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class TargetChoices(Protocol):
    """The target's choices by row: a list, or choices made on access."""

    def __getitem__(self, row: int, /) -> int: ...


def accept(tokens: Sequence[int], parents: Sequence[int], choices: TargetChoices) -> Verdict:
    """Accept the longest path of draft tokens that equal the target's choices.

    Of siblings with the same token the rule follows the first. This can shorten the path but never changes the output.

    Args:
        tokens: [m] draft tokens.
        parents: [m] parent of each node.
        choices: [1 + m] the target's choice after the root and after each node. Only the rows of the path are read, in
            order and once.
    """
    current, path, choice = ROOT, [], choices[0]
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent == current and token == choice:
            current, choice = node, choices[1 + node]
            path.append(node)
    return Verdict(tuple(path), choice)


def sampling_probs(logits_TV: Tensor, temperature: float, top_p: float, top_k: int = 0, min_p: float = 0.0) -> Tensor:
    """Return the sampling distributions [T, V]: temperature, then min-p, top-k and top-p, as in vLLM.

    Min-p keeps the tokens that are at least ``min_p`` times as likely as the likeliest. Top-p keeps the smallest set of
    the most likely tokens whose share of the mass after min-p and top-k reaches ``top_p``. Top-k and top-p also keep
    all tokens that are as likely as the last one kept: the order among them depends on the sort.

    Args:
        logits_TV: [T, V] logits; -inf excludes a token.
        temperature: At least ``MIN_TEMPERATURE``, which replaces lower values; greedy requests take the argmax.
        top_p: Probability mass to keep, above 0; 1 keeps all.
        top_k: Tokens to keep; 0 keeps all.
        min_p: From 0, which keeps all, to 1.
    """
    probs_TV = torch.softmax(logits_TV.float() / max(temperature, MIN_TEMPERATURE), dim=-1)
    few = 0 < top_k < probs_TV.shape[-1]
    if min_p <= 0 and top_p >= 1 and not few:
        return probs_TV
    if min_p > 0:
        probs_TV = probs_TV.masked_fill(probs_TV < min_p * probs_TV.amax(dim=-1, keepdim=True), 0)
    if few or top_p < 1:
        ordered_TV = _descending(probs_TV)
        if few:
            least_T1 = ordered_TV[:, top_k - 1 : top_k]
            ordered_TV = ordered_TV.masked_fill(ordered_TV < least_T1, 0)
        if top_p < 1:
            mass_TV = ordered_TV.cumsum(dim=-1, dtype=torch.float64)
            least_T1 = ordered_TV.gather(-1, torch.searchsorted(mass_TV, top_p * mass_TV[:, -1:]))
        probs_TV = probs_TV.masked_fill(probs_TV < least_T1, 0)
    return probs_TV / probs_TV.sum(dim=-1, keepdim=True)


def _descending(probs_TV: Tensor) -> Tensor:
    """Return the values of each row in descending order."""
    if probs_TV.is_cpu:
        # NumPy sorts values with vector instructions; torch also sorts indices and takes twenty times as long.
        return torch.from_numpy(np.sort(probs_TV.numpy(), axis=-1)).flip(-1)
    return probs_TV.sort(dim=-1, descending=True).values
