"""What the target chooses by the definition of each parameter, in plain Python and without state."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from schemas.speculator.acceptance import sampling_probs
from serving.engines.base import Request
from serving.engines.builtin.noise import exponential_noise


def plain_logits(
    logits: Sequence[float], request: Request, output: Sequence[int], eos_ids: Collection[int]
) -> list[float]:
    """The logits after ``output`` with the penalties, biases and exclusions of a request, token by token."""
    found = []
    for token, logit in enumerate(logits):
        if request.allowed_token_ids is not None and token not in request.allowed_token_ids:
            found.append(-math.inf)
            continue
        value = float(np.float32(logit) + np.float32(request.logit_bias.get(token, 0.0)))
        if token in request.prompt or token in output:
            value = value / request.repetition_penalty if value > 0 else value * request.repetition_penalty
            value = min(max(value, -1e30), 1e30)
        value -= request.frequency_penalty * output.count(token)
        value -= request.presence_penalty * (token in output)
        found.append(value)
    if len(output) < request.min_tokens:
        ends = set(request.stop_ids) | (set() if request.ignore_eos else set(eos_ids))
        longer = [-math.inf if token in ends else value for token, value in enumerate(found)]
        found = longer if max(longer) > -math.inf else found
    return found


def choice_scores(logits_V: Tensor, request: Request, output: Sequence[int], eos_ids: Collection[int]) -> Tensor:
    """[V] scores whose argmax is the target's choice; a near-tie may be decided by rounding. -inf is excluded."""
    processed = torch.tensor(plain_logits(logits_V.tolist(), request, output, eos_ids))
    if request.temperature == 0:
        return processed
    probs_V = sampling_probs(processed[None], request.temperature, request.top_p, request.top_k, request.min_p)[0]
    assert request.seed is not None
    position = len(request.prompt) + len(output)
    noise_V = exponential_noise(request.seed, position, np.arange(len(probs_V)))
    return probs_V.double().log() - torch.from_numpy(noise_V).log()
