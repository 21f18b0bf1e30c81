"""Capture: takes the results of SGLang's steps as tensors of our own, and copies them to the host.

Letters: R recorded requests, n nodes of a request's draft tree (0 is the root), k teacher width, F feature width, V
vocabulary, d longest path. The capture is a fixed amount of work on the current stream: nothing waits for a value, and
no result shares memory with the server's buffers.

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


def top_tokens_of_nodes(verify_input: Any, logits: Tensor, rows_R: Tensor | None, k: int) -> TopTokens:
    """Return [R, n, k] tokens at every node. Call it before sampling, which changes the logits in place."""
    logits_BnV = logits.view(-1, verify_input.draft_token_num, logits.shape[-1])
    return top_tokens(_select(logits_BnV, rows_R), k)


def capture_verify_step(
    verify_input: Any, batch: Any, hidden: Tensor | None, result: Any, rows_R: Tensor | None, top: TopTokens
) -> dict[str, Tensor]:
    """Return a verify step: the links of the draft tree, the accepted nodes, and the hidden states at these.

    Args:
        verify_input: SGLang's ``EagleVerifyInput``.
        batch: Its ``ScheduleBatch``.
        hidden: [B * n, F] captured hidden states of all nodes; None if they are not published.
        result: Result of ``eagle_sample``.
        rows_R: Recorded rows of the batch; None for all.
        top: From ``top_tokens_of_nodes``.
    """
    predict, accept_lens, accept_index = result
    nodes = verify_input.draft_token_num
    first_child = verify_input.retrieve_next_token
    accepted_Rd = _select(accept_index, rows_R)
    root_R1 = _select(torch.arange(0, len(first_child) * nodes, nodes, device=first_child.device), rows_R)[:, None]
    found = {
        "position": _select(batch.seq_lens, rows_R),
        "draft_tokens": _select(verify_input.draft_token.view(-1, nodes), rows_R),
        "first_child": _select(first_child, rows_R),
        "next_sibling": _select(verify_input.retrieve_next_sibling, rows_R),
        "chosen": _select(predict.view(-1, nodes), rows_R),
        "accepted": accepted_Rd - root_R1,
        "count": _select(accept_lens, rows_R),
    }
    found = {name: value.to(torch.int32, copy=True) for name, value in found.items()}
    found |= {"top_ids": top.ids, "top_logprobs": top.logprobs}
    if hidden is not None:
        found["features"] = _bf16_bits(hidden[accepted_Rd.clamp(min=0).long()])
    return found


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
        found["features"] = _bf16_bits(torch.cat([hidden[span] for span in spans]))
    return found


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


def _select(values: Tensor, rows_R: Tensor | None) -> Tensor:
    return values if rows_R is None else values.index_select(0, rows_R)


def _bf16_bits(hidden: Tensor) -> Tensor:
    """Return bf16 bit patterns, in memory of their own if ``hidden`` is a fresh tensor."""
    return hidden.to(torch.bfloat16).view(torch.int16)
