"""Logits processors: what changes the target's logits before an output token is chosen from them.

A processor belongs to one sequence. The target's own logits stay as they are for log-probabilities and traces: the
speculator learns the target, not the constraints of a request.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor


class LogitsProcessor(Protocol):
    """Changes the logits from which the output tokens of one sequence are chosen."""

    def process(self, logits_V: Tensor, output: Seq[int]) -> Tensor:
        """Return the logits after ``output``; an excluded token has -inf.

        The acceptance rule calls it once for each output token, in order: ``output`` holds the tokens of the call
        before and one more. A draft token is in it only after it was accepted. A call may follow a token that ends the
        output.

        Args:
            logits_V: fp32 logits on the CPU, which may be changed in place.
            output: All output tokens before the one to choose.
        """


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
