"""Log-probabilities of the prompt's own tokens.

A prompt has many more rows than a verify step, and a row of logits has the size of the vocabulary. So the logits of a
few rows at a time are computed, reduced and dropped.

Shape suffixes: T tokens, H hidden size, R rows of one part, V vocabulary, k alternatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from serving.engines.base import TokenLogprobs
from serving.engines.builtin.kernels import topk

_ROWS = 16
"""Rows whose logits exist at the same time."""


def score_tokens(
    logits: Callable[[Tensor], Tensor], last_TH: Tensor, following: Sequence[int], alternatives: int
) -> tuple[TokenLogprobs, ...]:
    """Return the log-probability of the token that follows each row, and of the likeliest ones there.

    Args:
        logits: Returns the logits [R, V] of hidden states [R, H].
        last_TH: Hidden states after the final norm.
        following: The T tokens that follow the rows.
        alternatives: Number k of the likeliest tokens to report.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    scored: list[TokenLogprobs] = []
    for start in range(0, len(following), _ROWS):
        tokens = following[start : start + _ROWS]
        logits_RV = logits(last_TH[start : start + _ROWS])
        normalizer_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
        tokens_R1 = torch.tensor(tokens, device=logits_RV.device)[:, None]
        own = (logits_RV.gather(1, tokens_R1) - normalizer_R1)[:, 0].tolist()
        if any(map(math.isnan, own)):
            raise FloatingPointError("the target's logits are not finite")
        top = topk(logits_RV, min(max(alternatives, 1), logits_RV.shape[-1]))
        ids_Rk, logprobs_Rk = top.ids_Rk.tolist(), (top.scores_Rk - normalizer_R1).tolist()
        scored += [
            TokenLogprobs(logprob, tuple(zip(ids[:alternatives], logprobs[:alternatives], strict=True)))
            for logprob, ids, logprobs in zip(own, ids_Rk, logprobs_Rk, strict=True)
        ]
    return tuple(scored)
