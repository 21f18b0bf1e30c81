"""Capture: takes the results of a server's steps as tensors of our own, and copies them to the host.

Letters: R recorded requests, T tokens of the step, B requests of the batch, k teacher width, F feature width, V
vocabulary. The capture is a fixed amount of work on the current stream: nothing waits for a value, and no result shares
memory with the server's buffers.

On a GPU the server's stream makes the captured tensors, since its buffers belong to captured graphs and are overwritten
in the next step. A second stream copies them to pinned memory and records an event; the reader waits for the event on
its own thread. On a CPU nothing has to be waited for. The tests of this repository never run the GPU part.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TopTokens(NamedTuple):
    """The target's likeliest tokens, before penalties, masks and temperature."""

    ids: Tensor
    """[.., k] int32, best first."""
    logprobs: Tensor
    """[.., k] float32."""


def top_tokens(logits: Tensor, k: int) -> TopTokens:
    """Return the k best of [.., V] logits, with their log-probabilities."""
    scores = logits.float()
    best = scores.topk(min(k, scores.shape[-1]), dim=-1)
    return TopTokens(best.indices.int(), best.values - scores.logsumexp(dim=-1, keepdim=True))


def capture_prefill(
    hidden: Tensor | None, next_tokens: Tensor, top: TopTokens, rows_R: Tensor, spans: list[slice]
) -> dict[str, Tensor]:
    """Return parts of some prompts: the hidden states of every token, and the target's choice after the last.

    Args:
        hidden: [T, F] captured hidden states of all tokens of the batch; None if they are not published.
        next_tokens: [B] token chosen after each part.
        top: [B, k] at the end of each part.
        rows_R: Recorded rows of the batch.
        spans: [R] position of their tokens in ``hidden``.
    """
    found = {
        "chosen": next_tokens.index_select(0, rows_R).to(torch.int32, copy=True),
        "top_ids": top.ids.index_select(0, rows_R),
        "top_logprobs": top.logprobs.index_select(0, rows_R),
    }
    if hidden is not None:
        found["features"] = bf16_bits(torch.cat([hidden[span] for span in spans]))
    return found


def bf16_bits(hidden: Tensor) -> Tensor:
    """Return bf16 bit patterns, in memory of their own if ``hidden`` is a fresh tensor."""
    return hidden.to(torch.bfloat16).view(torch.int16)


@dataclass(frozen=True, slots=True)
class PendingTensors:
    """Tensors on their way to the host."""

    tensors: Mapping[str, Tensor]
    done: torch.cuda.Event | None

    def wait(self) -> Mapping[str, Tensor]:
        """Return the tensors once they are copied; the interpreter lock is free meanwhile."""
        if self.done is not None:
            self.done.synchronize()
        return self.tensors


class HostTransfer:
    """Copies tensors of one device, a CPU or a GPU, to the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # torch.cuda has no types for its constructors.
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def copy(self, tensors: Mapping[str, Tensor]) -> PendingTensors:
        """Start to copy tensors that were made on the current stream and are not written again."""
        if self._stream is None:
            return PendingTensors(tensors, None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            hosted = {name: self._copy(tensor) for name, tensor in tensors.items()}
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return PendingTensors(hosted, done)

    def index(self, numbers: Sequence[int]) -> Tensor:
        """Return row numbers as an index on the device."""
        index = torch.tensor(numbers, dtype=torch.int64)
        return index if self._stream is None else index.pin_memory().to(self._device, non_blocking=True)

    def stamp(self) -> Any:
        """Return a time stamp of this point of the server's work, for ``elapsed_us``."""
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _copy(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        # The allocator must not reuse the tensor's memory before our stream has read it.
        tensor.record_stream(self._stream)
        return host


def elapsed_us(start: Any, end: Any) -> int:
    """Return the microseconds between two stamps that the device has passed."""
    if isinstance(start, float):
        return int((end - start) * 1e6)
    return int(start.elapsed_time(end) * 1e3)
