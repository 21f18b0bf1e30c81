"""Logits processors: what changes the target's logits before an output token is chosen from them.

A processor belongs to one sequence. The target's own logits stay as they are for log-probabilities and traces: the
speculator learns the target, not the constraints of a request.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from serving.engines.base import Request

_LARGEST = 1e30
"""Bound of penalized logits: divided by the smallest temperature they still are fp32 numbers."""


class LogitsProcessor(Protocol):
    """Changes the logits from which the output tokens of one sequence are chosen."""

    def process(self, logits_V: Tensor, output: Seq[int], /) -> Tensor:
        """Return the logits after ``output``; an excluded token has -inf.

        The acceptance rule calls it once for each output token, in order: ``output`` holds the tokens of the call
        before and one more. A draft token is in it only after it was accepted. A call may follow a token that ends the
        output.

        Args:
            logits_V: fp32 logits on the CPU, which may be changed in place.
            output: All output tokens before the one to choose.
        """


class AllowedTokens:
    """Excludes all other tokens (``allowed_token_ids``)."""

    def __init__(self, tokens: Collection[int]) -> None:
        self._tokens_n = torch.tensor(sorted(tokens))

    def process(self, logits_V: Tensor, _output: Seq[int]) -> Tensor:
        """Return the logits of the allowed tokens."""
        allowed_V = torch.full_like(logits_V, -torch.inf)
        allowed_V[self._tokens_n] = logits_V[self._tokens_n]
        return allowed_V


class LogitBias:
    """Adds a number to the logit of each given token (``logit_bias``)."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._tokens_n, self._bias_n = torch.tensor(list(bias)), torch.tensor(list(bias.values()))

    def process(self, logits_V: Tensor, _output: Seq[int]) -> Tensor:
        """Add the bias."""
        logits_V[self._tokens_n] += self._bias_n
        return logits_V


class RepetitionPenalty:
    """Divides positive logits of the tokens of prompt and output, and multiplies negative ones."""

    def __init__(self, penalty: float, prompt: Iterable[int]) -> None:
        self._penalty = penalty
        self._seen = set(prompt)
        self._read = 0

    def process(self, logits_V: Tensor, output: Seq[int]) -> Tensor:
        """Penalize every token that was seen, once."""
        self._seen.update(output[self._read :])
        self._read = len(output)
        seen_n = np.fromiter(self._seen, np.int64, len(self._seen))
        logits = logits_V.numpy()
        before_n = logits[seen_n].astype(np.float64)
        with np.errstate(over="ignore"):
            penalized_n = np.where(before_n > 0, before_n / self._penalty, before_n * self._penalty)
        logits[seen_n] = np.where(np.isinf(before_n), before_n, penalized_n.clip(-_LARGEST, _LARGEST))
        return logits_V


class OutputPenalties:
    """Subtracts from the logits of output tokens: by how often each occurred, and once if it did.

    The parameters are ``frequency_penalty`` and ``presence_penalty``.
    """

    def __init__(self, frequency: float, presence: float) -> None:
        self._frequency, self._presence = frequency, presence
        self._counts = Counter[int]()
        self._read = 0

    def process(self, logits_V: Tensor, output: Seq[int]) -> Tensor:
        """Penalize the output tokens."""
        self._counts.update(output[self._read :])
        self._read = len(output)
        tokens_n = np.fromiter(self._counts.keys(), np.int64, len(self._counts))
        counts_n = np.fromiter(self._counts.values(), np.float32, len(self._counts))
        logits_V.numpy()[tokens_n] -= self._frequency * counts_n + self._presence
        return logits_V


class MinTokens:
    """Excludes the tokens that end the output until it is long enough (``min_tokens``).

    Where other processors leave only such tokens, the output ends.
    """

    def __init__(self, minimum: int, ends: Collection[int]) -> None:
        self._minimum = minimum
        self._ends_n = torch.tensor(sorted(ends), dtype=torch.int64)

    def process(self, logits_V: Tensor, output: Seq[int]) -> Tensor:
        """Exclude the tokens that end the output."""
        if len(output) >= self._minimum:
            return logits_V
        longer_V = logits_V.clone()
        # A tokenizer can have more tokens than its target.
        longer_V[self._ends_n[self._ends_n < len(logits_V)]] = -torch.inf
        return logits_V if longer_V.max() == -torch.inf else longer_V


def create_processors(
    request: Request, eos_ids: frozenset[int], grammar: LogitsProcessor | None = None
) -> tuple[LogitsProcessor, ...]:
    """Return the processors that a request asks for, in the order in which they apply; none for neutral parameters."""
    found: list[LogitsProcessor] = [] if grammar is None else [grammar]
    if request.allowed_token_ids is not None:
        found.append(AllowedTokens(request.allowed_token_ids))
    if request.logit_bias:
        found.append(LogitBias(request.logit_bias))
    if request.repetition_penalty != 1:
        found.append(RepetitionPenalty(request.repetition_penalty, request.prompt))
    if request.frequency_penalty or request.presence_penalty:
        found.append(OutputPenalties(request.frequency_penalty, request.presence_penalty))
    if request.min_tokens:
        ends = request.stop_ids | (frozenset() if request.ignore_eos else eos_ids)
        found.append(MinTokens(request.min_tokens, ends))
    return tuple(found)


def process(processors: Iterable[LogitsProcessor], logits_V: Tensor, output: Seq[int]) -> Tensor:
    """Return a copy of the logits of one row after all processors, on the CPU and in fp32.

    Raises:
        ValueError: the processors exclude every token.
    """
    processed_V = logits_V.to("cpu", torch.float32, copy=True)
    for processor in processors:
        processed_V = processor.process(processed_V, output)
    if processed_V.max() == -torch.inf:
        raise ValueError("the constraints of the request exclude every token")
    return processed_V
