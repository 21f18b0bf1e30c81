"""Hooks around vLLM's model runner. No error raised here reaches the server.

A step reads parts of prompts and verifies drafts in one batch, and then drafts for the next step. The calls::

    execute_model ──▶ _sample ──▶ propose_draft_token_ids
    logits            accepted    drafts that a later step verifies

With asynchronous scheduling vLLM starts a step before it has read the result of the one before: every value of a step
is taken from the device, and nothing waits for it. vLLM reports the end of a request to its workers without a reason,
and may have cut the output before: the recorder finds the end in the output.

Letters: R recorded requests, B requests of the batch, T tokens of the step, L rows of logits, n nodes of the longest
draft (0 is the root), k teacher width, F feature width, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from schemas.settings import Settings
from serving.engines.base import Finish, Request
from serving.engines.plugin import capture
from serving.engines.plugin.capture import HostTransfer, TopTokens
from serving.engines.plugin.metrics import CaptureLimit, PluginMetrics
from serving.engines.plugin.recorder import (
    Duration,
    PromptPart,
    RecordedRequest,
    Recorder,
    RequestEnd,
    VerifiedRequest,
)
from serving.engines.plugin.row_drafter import RowDraft
from serving.engines.plugin.step_hooks import StepHooks, guard
from serving.engines.plugin.trace_options import TraceOptions, Untraced, read_fields
from serving.engines.plugin.verify_steps import ActiveSpeculator, OutputLimit


@dataclass(slots=True, eq=False)
class _Followed:
    """A recorded request in vLLM's batch."""

    recorded: RecordedRequest
    read: int
    """Tokens of its prompt that are in the key-value cache."""
    speculator: ActiveSpeculator
    """The version that made its last draft."""
    finish: Finish
    """Why it ended, if its output does not show that."""


@dataclass(slots=True)
class _Rows:
    """Recorded requests of a step, with the places of their tokens and logits in the batch."""

    parts: list[PromptPart] = field(default_factory=list)
    part_rows: list[int] = field(default_factory=list)
    """Rows of the batch."""
    part_logits: list[int] = field(default_factory=list)
    part_spans: list[slice] = field(default_factory=list)
    """Their tokens in the step."""
    verified: list[VerifiedRequest] = field(default_factory=list)
    verified_rows: list[int] = field(default_factory=list)
    roots: list[int] = field(default_factory=list)
    """Places of their roots in the step; the draft tokens follow."""
    root_logits: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    """Numbers of draft tokens."""


class _Step(NamedTuple):
    """A step between its forward and its sampling."""

    tokens: dict[str, int]
    """Scheduled tokens by request."""
    aux: list[Tensor]
    """[T, H] hidden states of three layers, maybe padded."""
    top: TopTokens
    """[L, k]."""
    verification: Duration


class RunnerHooks(StepHooks):
    """Hooks of one worker.

    Args:
        runner: vLLM's ``GPUModelRunner``, or its subclass for CPUs.
        settings: Settings of traces.
        recorder: Takes the captured steps.
        transfer: Copies tensors to the host.
        limit: Limits the recorded requests.
        metrics: Counters.
        version: Returns the version of the draft.
        verified_draft: Returns what was drafted for a request, in the step whose tokens were sampled last; None if the
            speculator alone drafts.
    """

    def __init__(
        self,
        runner: Any,
        settings: Settings,
        recorder: Recorder,
        transfer: HostTransfer,
        limit: CaptureLimit,
        metrics: PluginMetrics,
        version: Callable[[], str],
        verified_draft: Callable[[str], RowDraft | None] | None = None,
    ) -> None:
        super().__init__(settings.traces, recorder, transfer, limit, metrics)
        self._runner, self._version, self._verified_draft = runner, version, verified_draft
        self._requests: dict[str, _Followed] = {}
        self._started: Any = None
        self._drafting: Duration = (transfer.stamp(), transfer.stamp())
        self._step: _Step | None = None

    def install(self) -> None:
        """Wrap the three methods of the runner."""
        runner = self._runner
        execute, sample, propose = runner.execute_model, runner._sample, runner.propose_draft_token_ids

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self.on_scheduled(scheduler_output)
            result = execute(scheduler_output, *args, **kwargs)
            self.on_forward(scheduler_output)
            return result

        def sample_rows(logits: Any, spec_decode_metadata: Any) -> Any:
            result = sample(logits, spec_decode_metadata)
            self.on_sampled(spec_decode_metadata, result.sampled_token_ids)
            return result

        def propose_draft_token_ids(*args: Any, **kwargs: Any) -> Any:
            start = self._transfer.stamp()
            result = propose(*args, **kwargs)
            self.on_drafted(start)
            return result

        runner.execute_model, runner._sample = execute_model, sample_rows
        runner.propose_draft_token_ids = propose_draft_token_ids

    @guard
    def on_scheduled(self, scheduled: Any) -> None:
        """Note which requests have ended, begin, or are read again."""
        self._start_step()
        self._step, self._started = None, self._transfer.stamp()
        for name in scheduled.finished_req_ids:
            if followed := self._requests.pop(name, None):
                self._recorder.put(RequestEnd(followed.recorded, None, followed.finish))
        for new in scheduled.scheduled_new_reqs:
            self._begin(new)
        for name in scheduled.scheduled_cached_reqs.resumed_req_ids:
            if followed := self._requests.get(name):
                self._stop(followed.recorded, "retracted")

    @guard
    def on_forward(self, scheduled: Any) -> None:
        """Take the top tokens, before masks are applied to the logits in place."""
        state = self._runner.execute_model_state
        if state is None or not self._requests:
            return
        if state.aux_hidden_states is None:
            raise RuntimeError("the target's hidden states were not captured")
        top = capture.top_tokens(state.logits, self._traces.top_k)
        verification = (self._started, self._transfer.stamp())
        self._step = _Step(dict(scheduled.num_scheduled_tokens), state.aux_hidden_states, top, verification)

    @guard
    def on_sampled(self, metadata: Any, sampled: Tensor) -> None:
        """Record what was read and what was accepted.

        Args:
            metadata: vLLM's ``SpecDecodeMetadata``; None if no request of the batch has a draft.
            sampled: [B, m] accepted tokens and the bonus token of each request, then -1.
        """
        step, self._step = self._step, None
        if step is None:
            return
        batch = self._runner.input_batch.req_ids
        rows = self._rows(step.tokens, batch, metadata.num_draft_tokens if metadata else [0] * len(batch))
        width = sum(layer.shape[-1] for layer in step.aux)
        if rows.parts:
            found = self._capture_parts(step, rows, sampled)
            self._put(tuple(rows.parts), found, width, self._drafting, step.verification)
        if rows.verified:
            found = self._capture_verified(step, rows, sampled)
            self._put(tuple(rows.verified), found, width, self._drafting, step.verification)

    @guard
    def on_drafted(self, start: Any) -> None:
        """Note which version has drafted for the requests of the batch."""
        self._drafting = (start, self._transfer.stamp())
        speculator = self._active(self._version())
        for name in self._runner.input_batch.req_ids:
            if followed := self._requests.get(name):
                followed.speculator = speculator

    def _begin(self, new: Any) -> None:
        if followed := self._requests.get(new.req_id):
            self._stop(followed.recorded, "continued")  # a prompt that arrives in parts
            return
        options = _read_options(new)
        if not self._admit(new.req_id, options, new.num_computed_tokens):
            return
        request, sampling = _to_request(new, options), new.sampling_params
        # The scheduler compares with both at every token.
        stop_ids = {*(sampling.stop_token_ids or ()), sampling.eos_token_id} - {None}
        total = min(len(request.prompt) + request.max_tokens, self._runner.max_model_len)
        recorded = RecordedRequest(request, limit=OutputLimit(total, frozenset(stop_ids)))
        finish: Finish = "stop" if sampling.stop else "cancelled"
        self._requests[new.req_id] = _Followed(recorded, new.num_computed_tokens, self._active(self._version()), finish)

    def _rows(self, tokens: dict[str, int], batch: list[str], drafted: list[int]) -> _Rows:
        rows, at, logits = _Rows(), 0, 0
        for row, name in enumerate(batch):
            followed = self._requests.get(name)
            if followed is not None and not followed.recorded.is_stopped:
                draft = self._verified_draft(name) if self._verified_draft and drafted[row] else None
                _add(rows, followed, row, at, logits, tokens[name], drafted[row], draft)
            at += tokens[name]
            logits += 1 + drafted[row]
        return rows

    def _capture_parts(self, step: _Step, rows: _Rows, sampled: Tensor) -> dict[str, Tensor]:
        index = self._transfer.index(rows.part_logits)
        top = TopTokens(step.top.ids[index], step.top.logprobs[index])
        tokens_R = sampled[self._transfer.index(rows.part_rows), 0]
        found = capture.capture_prefill(None, tokens_R, top, self._transfer.index(range(len(rows.parts))), [])
        if self._traces.features != "recompute":
            layers = [torch.cat([layer[span] for span in rows.part_spans]) for layer in step.aux]
            found["features"] = capture.bf16_bits(torch.cat(layers, dim=-1))
        return found

    def _capture_verified(self, step: _Step, rows: _Rows, sampled: Tensor) -> dict[str, Tensor]:
        nodes = 1 + max(rows.drafted)
        order_n = torch.arange(nodes, device=sampled.device)
        row_R, root_R, logits_R, drafted_R = self._transfer.index(
            [*rows.verified_rows, *rows.roots, *rows.root_logits, *rows.drafted]
        ).view(4, -1)
        # A shorter draft's row ends with nodes that no link reaches; their values are those of any other token.
        place_Rn = (root_R[:, None] + order_n).clamp(max=sum(step.tokens.values()) - 1)
        logits_Rn = (logits_R[:, None] + order_n).clamp(max=len(step.top.ids) - 1)
        chosen_Rn = sampled[row_R, :nodes]
        no_node_Rn = torch.full_like(place_Rn, -1)
        found = {
            "position": self._runner.positions[root_R],
            "draft_tokens": self._runner.input_ids.gpu[place_Rn],
            "first_child": torch.where(order_n < drafted_R[:, None], order_n + 1, no_node_Rn),
            "next_sibling": no_node_Rn,
            "chosen": chosen_Rn,
            "accepted": order_n.expand_as(place_Rn),
            "count": (chosen_Rn >= 0).sum(dim=1),
        }
        found = {name: value.to(torch.int32, copy=True) for name, value in found.items()}
        found |= {"top_ids": step.top.ids[logits_Rn], "top_logprobs": step.top.logprobs[logits_Rn]}
        if self._traces.features != "recompute":
            found["features"] = capture.bf16_bits(torch.cat([layer[place_Rn] for layer in step.aux], dim=-1))
        return found


def _add(
    rows: _Rows,
    followed: _Followed,
    row: int,
    at: int,
    logits: int,
    length: int,
    drafted: int,
    draft: RowDraft | None,
) -> None:
    """Add a request whose ``length`` tokens begin at ``at``, and whose logits begin at ``logits``."""
    recorded, start = followed.recorded, followed.read
    prompt = recorded.request.prompt
    if start < len(prompt):
        followed.read = end = start + length
        rows.parts.append(PromptPart(recorded, start, prompt[start:end], end == len(prompt)))
        rows.part_rows.append(row)
        rows.part_logits.append(logits)
        rows.part_spans.append(slice(at, at + length))
        return
    recorded.verify_steps += 1
    rows.verified.append(VerifiedRequest(recorded, recorded.verify_steps, followed.speculator, None, draft))
    rows.verified_rows.append(row)
    rows.roots.append(at)
    rows.root_logits.append(logits)
    rows.drafted.append(drafted)


def _read_options(new: Any) -> TraceOptions:
    """Return the options of vLLM's request, which clients pass as ``vllm_xargs``."""
    if new.prompt_token_ids is None or new.prompt_embeds is not None or new.sampling_params is None:
        return TraceOptions("no_tokens")
    untraced: Untraced | None = None
    if new.lora_request is not None:
        untraced = "lora"  # its target differs from the line's
    elif new.mm_features:
        untraced = "multimodal"  # its prompt has more than tokens
    elif new.num_computed_tokens >= len(new.prompt_token_ids):
        untraced = "retracted"
    return read_fields(new.sampling_params.extra_args, untraced)


def _to_request(new: Any, options: TraceOptions) -> Request:
    """Return vLLM's request as a ``Request``."""
    sampling = new.sampling_params
    return Request(
        id=new.req_id,
        prompt=tuple(new.prompt_token_ids),
        max_tokens=sampling.max_tokens or 0,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=max(sampling.top_k, 0),
        min_p=sampling.min_p,
        seed=sampling.seed,
        label=options.label,
    )
