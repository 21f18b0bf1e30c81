"""Hooks that run inside the server's steps. No error raised here reaches the server.

A step is ``forward_batch_generation`` of the worker; it either prefills prompts, or drafts and verifies. The calls::

    STEP ──▶ (SAMPLE ─▶ PREFILL)            prompts: logits, then hidden states and the first token
    STEP ──▶ VERIFY ──▶ ACCEPT              drafted ─▶ verified ─▶ accepted
    RELEASE                                 a request frees its memory: it has ended, or is retracted and read again

RELEASE may come a step late: with the overlap scheduler it follows the next ACCEPT.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import structlog
from torch import Tensor

from schemas.settings import Settings
from serving.engines.base import Finish
from serving.engines.sglang.plugin import capture
from serving.engines.sglang.plugin.capture import HostTransfer, TopTokens
from serving.engines.sglang.plugin.metrics import CaptureLimit, PluginMetrics
from serving.engines.sglang.plugin.recorder import (
    CapturedStep,
    PromptPart,
    RecordedRequest,
    Recorder,
    RequestEnd,
    VerifiedRequest,
)
from serving.engines.sglang.plugin.trace_request import read_options, to_request
from serving.engines.sglang.plugin.verify_steps import ActiveSpeculator
from serving.traces.sampling import is_sampled

log = structlog.get_logger()

_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "cancelled"}
Hook = TypeVar("Hook", bound=Callable[..., Any])


def guard(hook: Hook) -> Hook:
    """Count a hook's error instead of raising it, which would end the server; count the hook's time."""

    @wraps(hook)
    def run(self: Hooks, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a fault of ours, of any kind, would end the scheduler and every request with it
            self.count_error(hook.__name__, error)
            return None
        finally:
            self.add_cost(time.perf_counter() - start)

    return run  # type: ignore[return-value]


class _PrefillLogits(NamedTuple):
    """Top tokens of prompts, taken before the sampler changes the logits in place."""

    output: Any
    top: TopTokens


class _VerifyLogits(NamedTuple):
    """Top tokens of a verify step, taken before its tokens are accepted."""

    rows: Sequence[int]
    rows_R: Tensor | None
    top: TopTokens


class Hooks:
    """State of one scheduler process.

    Args:
        settings: Settings of traces and of this plugin.
        recorder: Takes the captured steps.
        transfer: Copies tensors to the host.
        limit: Limits the recorded requests.
        metrics: Counters.
        version: Returns the version of the server's draft.
    """

    def __init__(
        self,
        settings: Settings,
        recorder: Recorder,
        transfer: HostTransfer,
        limit: CaptureLimit,
        metrics: PluginMetrics,
        version: Callable[[], str],
    ) -> None:
        self._traces = settings.traces
        self._recorder, self._transfer, self._limit, self._metrics = recorder, transfer, limit, metrics
        self._version = version
        self._speculator = ActiveSpeculator("", 0)
        self._requests: dict[str, RecordedRequest] = {}
        self._failed_hooks: set[str] = set()
        self._cost_s = 0.0
        self._start: Any = None
        self._drafted: Any = None
        self._verified: Any = None
        self._prefill_logits: _PrefillLogits | None = None

    def count_error(self, hook: str, error: Exception) -> None:
        """Count a hook's error, and log the hook's first one."""
        self._metrics.hook_errors.labels(hook).inc()
        if hook not in self._failed_hooks:
            self._failed_hooks.add(hook)
            log.error("aurora_hook_failed", hook=hook, exc_info=error)

    def add_cost(self, seconds: float) -> None:
        """Count time that a hook took from the step."""
        self._cost_s += seconds
        self._limit.add_cost(seconds)

    @guard
    def on_step(self) -> None:
        """Start a step."""
        self._metrics.hook_duration.observe(self._cost_s)
        self._cost_s = 0.0
        self._limit.start_step(time.monotonic())
        self._prefill_logits = None
        self._start = self._drafted = self._verified = self._transfer.stamp()

    @guard
    def on_drafted(self) -> None:
        """Note the end of drafting; the target verifies now."""
        self._drafted = self._transfer.stamp()

    @guard
    def on_prefill_logits(self, logits_output: Any) -> None:
        """Take the top tokens after the prompts' last tokens."""
        self._verified = self._transfer.stamp()
        top = capture.top_tokens(logits_output.next_token_logits, self._traces.top_k)
        self._prefill_logits = _PrefillLogits(logits_output, top)

    @guard
    def on_prefill(self, result: Any, batch: Any) -> None:
        """Record the parts of prompts that were read."""
        logits, self._prefill_logits = self._prefill_logits, None
        if batch.forward_mode.is_idle():
            return
        rows, parts, spans = self._prompt_parts(batch)
        if not parts:
            return
        if logits is None or logits.output is not result.logits_output:
            raise RuntimeError("the logits of these prompts were not captured")
        hidden = result.logits_output.hidden_states
        found = capture.capture_prefill(
            self._published(hidden), result.next_token_ids, logits.top, self._transfer.index(rows), spans
        )
        self._put(parts, found, hidden.shape[-1])

    @guard
    def on_verify_logits(self, verify_input: Any, batch: Any, logits_output: Any) -> _VerifyLogits | None:
        """Take the top tokens of every node, before the sampler changes the logits in place."""
        if batch.forward_mode.is_idle():
            return None
        self._verified = self._transfer.stamp()
        rows = [i for i, req in enumerate(batch.reqs) if self._is_recorded(req)]
        if not rows:
            return None
        rows_R = None if len(rows) == len(batch.reqs) else self._transfer.index(rows)
        top = capture.top_tokens_of_nodes(verify_input, logits_output.next_token_logits, rows_R, self._traces.top_k)
        return _VerifyLogits(rows, rows_R, top)

    @guard
    def on_accepted(
        self, logits: _VerifyLogits, verify_input: Any, batch: Any, logits_output: Any, result: Any
    ) -> None:
        """Record the accepted nodes."""
        members = []
        for row in logits.rows:
            req = batch.reqs[row]
            recorded = self._requests[req.rid]
            recorded.verify_steps += 1
            committed = len(req.origin_input_ids) + len(req.output_ids)
            members.append(VerifiedRequest(recorded, recorded.verify_steps, committed))
        hidden = logits_output.hidden_states
        found = capture.capture_verify_step(
            verify_input, batch, self._published(hidden), result, logits.rows_R, logits.top
        )
        self._put(tuple(members), found, hidden.shape[-1])

    @guard
    def on_release(self, req: Any) -> None:
        """Record the end of a request, or stop recording one that is retracted."""
        recorded = self._requests.get(req.rid)
        if recorded is None:
            return
        if not req.finished():
            # The server will read it again from its start. Its trace so far stays, without further steps.
            self._stop(recorded, "retracted")
            return
        del self._requests[req.rid]
        finish = _FINISH.get(req.finished_reason.to_json()["type"], "error")
        self._recorder.put(RequestEnd(recorded, tuple(req.output_ids_through_stop), finish))

    def _put(self, members: tuple[PromptPart | VerifiedRequest, ...], found: dict[str, Tensor], width: int) -> None:
        if self._recorder.is_full():
            self._metrics.steps_dropped.labels("queue_full").inc(len(members))
            return
        stamps = (self._start, self._drafted, self._verified)
        pending, time_us = self._transfer.copy(found), time.time_ns() // 1000
        if (version := self._version()) != self._speculator.version:
            self._speculator = ActiveSpeculator(version, time_us)
        self._recorder.put(CapturedStep(members, pending, self._speculator, stamps, time_us, width))

    def _published(self, hidden: Tensor) -> Tensor | None:
        return None if self._traces.features == "recompute" else hidden

    def _is_recorded(self, req: Any) -> bool:
        recorded = self._requests.get(req.rid)
        return recorded is not None and not recorded.is_stopped

    def _prompt_parts(self, batch: Any) -> tuple[list[int], tuple[PromptPart, ...], list[slice]]:
        """Return the recorded rows of a batch of prompts, and the position of their tokens in it."""
        rows, parts, spans, at = [], [], [], 0
        for row, (req, start, length) in enumerate(zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)):
            part = self._prompt_part(req, start, length)
            if part is not None:
                rows.append(row)
                parts.append(part)
                spans.append(slice(at, at + length))
            at += length
        return rows, tuple(parts), spans

    def _prompt_part(self, req: Any, start: int, length: int) -> PromptPart | None:
        recorded = self._requests.get(req.rid) or self._admit(req, start)
        if recorded is None or recorded.is_stopped:
            return None
        end, prompt = start + length, recorded.request.prompt
        if end > len(prompt):
            self._stop(recorded, "mixed")  # a running request in one batch with prompts
            return None
        return PromptPart(recorded, start, prompt[start:end], end == len(prompt))

    def _admit(self, req: Any, start: int) -> RecordedRequest | None:
        """Decide once, at the first part of its prompt, whether a request is recorded."""
        options = read_options(req)
        if options.untraced or len(req.output_ids):
            self._metrics.untraced.labels(options.untraced or "retracted").inc()
            return None
        if not self._recorder.sample(req.rid):
            return None
        if not is_sampled(req.rid, self._traces.sample_ratio * self._limit.request_ratio):
            self._metrics.untraced.labels("capture_limit").inc()
            return None
        self._metrics.cached.inc(start)
        self._requests[req.rid] = recorded = RecordedRequest(to_request(req, options))
        return recorded

    def _stop(self, recorded: RecordedRequest, reason: str) -> None:
        if not recorded.is_stopped:
            recorded.is_stopped = True
            self._metrics.untraced.labels(reason).inc()
