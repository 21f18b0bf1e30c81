"""Hooks that run inside the server's steps. No error raised here reaches the server.

A step is ``forward_batch_generation`` of the worker; it either prefills prompts, or drafts and verifies. The calls::

    STEP ──▶ (SAMPLE ─▶ PREFILL)            prompts: logits, then hidden states and the first token
    STEP ──▶ VERIFY ──▶ ACCEPT              drafted ─▶ verified ─▶ accepted
    RELEASE                                 a request frees its memory: it has ended, or is retracted and read again

RELEASE may come a step late: with the overlap scheduler it follows the next ACCEPT.

Letters: R recorded requests, B requests of the batch, n nodes of a request's draft tree (0 is the root), k teacher
width, F feature width, V vocabulary, d longest path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from prometheus_client import REGISTRY, CollectorRegistry, Counter
from torch import Tensor

from schemas.settings import Settings
from serving.engines.base import Finish
from serving.engines.plugin import capture
from serving.engines.plugin.capture import HostTransfer, TopTokens
from serving.engines.plugin.metrics import CaptureLimit, PluginMetrics
from serving.engines.plugin.recorder import PromptPart, RecordedRequest, Recorder, RequestEnd, VerifiedRequest
from serving.engines.plugin.row_drafter import RowDraft
from serving.engines.plugin.step_hooks import StepHooks, guard
from serving.engines.sglang.plugin.trace_request import read_options, to_request

_FINISH: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "cancelled"}


class _PrefillLogits(NamedTuple):
    """Top tokens of prompts, taken before the sampler changes the logits in place."""

    output: Any
    top: TopTokens


class _VerifyLogits(NamedTuple):
    """Top tokens of a verify step, taken before its tokens are accepted."""

    rows: Sequence[int]
    rows_R: Tensor | None
    top: TopTokens


class SglangMetrics(PluginMetrics):
    """Counters of our plugin, with what SGLang itself does not count."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        super().__init__("sglang", registry)
        self.draft_tokens = Counter("aurora_sglang_draft_tokens", "Draft tokens of all requests.", registry=registry)


class Hooks(StepHooks):
    """Hooks of one scheduler process.

    Args:
        settings: Settings of traces and of this plugin.
        recorder: Takes the captured steps.
        transfer: Copies tensors to the host.
        limit: Limits the recorded requests.
        metrics: Counters.
        version: Returns the version of the server's draft.
        verified_draft: Returns what was drafted for a request, in the step whose tokens were sampled last; None if the
            speculator alone drafts.
    """

    def __init__(
        self,
        settings: Settings,
        recorder: Recorder,
        transfer: HostTransfer,
        limit: CaptureLimit,
        metrics: SglangMetrics,
        version: Callable[[], str],
        verified_draft: Callable[[str], RowDraft | None] | None = None,
    ) -> None:
        super().__init__(settings.traces, recorder, transfer, limit, metrics)
        self._version, self._draft_tokens, self._verified_draft = version, metrics.draft_tokens, verified_draft
        self._requests: dict[str, RecordedRequest] = {}
        self._start: Any = None
        self._drafted: Any = None
        self._verified: Any = None
        self._prefill_logits: _PrefillLogits | None = None

    @guard
    def on_step(self) -> None:
        """Start a step."""
        self._start_step()
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
        self._put_step(parts, found, hidden.shape[-1])

    @guard
    def on_verify_logits(self, verify_input: Any, batch: Any, logits_output: Any) -> _VerifyLogits | None:
        """Take the top tokens of every node, before the sampler changes the logits in place."""
        if batch.forward_mode.is_idle():
            return None
        self._verified = self._transfer.stamp()
        self._draft_tokens.inc(len(batch.reqs) * (verify_input.draft_token_num - 1))
        rows = [i for i, req in enumerate(batch.reqs) if self._is_recorded(req)]
        if not rows:
            return None
        rows_R = None if len(rows) == len(batch.reqs) else self._transfer.index(rows)
        top = _top_tokens_of_nodes(verify_input, logits_output.next_token_logits, rows_R, self._traces.top_k)
        return _VerifyLogits(rows, rows_R, top)

    @guard
    def on_accepted(
        self, logits: _VerifyLogits, verify_input: Any, batch: Any, logits_output: Any, result: Any
    ) -> None:
        """Record the accepted nodes."""
        members, speculator = [], self._active(self._version())
        for row in logits.rows:
            req = batch.reqs[row]
            recorded = self._requests[req.rid]
            recorded.verify_steps += 1
            committed = len(req.origin_input_ids) + len(req.output_ids)
            draft = self._verified_draft(req.rid) if self._verified_draft else None
            members.append(VerifiedRequest(recorded, recorded.verify_steps, speculator, committed, draft))
        hidden = logits_output.hidden_states
        found = _capture_verify_step(verify_input, batch, self._published(hidden), result, logits.rows_R, logits.top)
        self._put_step(tuple(members), found, hidden.shape[-1])

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

    def _put_step(
        self, members: tuple[PromptPart | VerifiedRequest, ...], found: dict[str, Tensor], width: int
    ) -> None:
        self._put(members, found, width, (self._start, self._drafted), (self._drafted, self._verified))

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
        recorded = self._requests.get(req.rid) or self._admit_request(req, start)
        if recorded is None or recorded.is_stopped:
            return None
        end, prompt = start + length, recorded.request.prompt
        if end > len(prompt):
            self._stop(recorded, "mixed")  # a running request in one batch with prompts
            return None
        return PromptPart(recorded, start, prompt[start:end], end == len(prompt))

    def _admit_request(self, req: Any, start: int) -> RecordedRequest | None:
        """Decide once, at the first part of its prompt, whether a request is recorded."""
        options = read_options(req)
        if not self._admit(req.rid, options, start):
            return None
        self._requests[req.rid] = recorded = RecordedRequest(to_request(req, options))
        return recorded


def _top_tokens_of_nodes(verify_input: Any, logits: Tensor, rows_R: Tensor | None, k: int) -> TopTokens:
    """Return [R, n, k] tokens at every node. Call it before sampling, which changes the logits in place."""
    logits_BnV = logits.view(-1, verify_input.draft_token_num, logits.shape[-1])
    return capture.top_tokens(_select(logits_BnV, rows_R), k)


def _capture_verify_step(
    verify_input: Any, batch: Any, hidden: Tensor | None, result: Any, rows_R: Tensor | None, top: TopTokens
) -> dict[str, Tensor]:
    """Return a verify step: the links of the draft tree, the accepted nodes, and the hidden states at these.

    Args:
        verify_input: SGLang's ``EagleVerifyInput``.
        batch: Its ``ScheduleBatch``.
        hidden: [B * n, F] captured hidden states of all nodes; None if they are not published.
        result: Result of ``eagle_sample``.
        rows_R: Recorded rows of the batch; None for all.
        top: From ``_top_tokens_of_nodes``.
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
        found["features"] = capture.bf16_bits(hidden[accepted_Rd.clamp(min=0).long()])
    return found


def _select(values: Tensor, rows_R: Tensor | None) -> Tensor:
    return values if rows_R is None else values.index_select(0, rows_R)
