"""Hooks that let the suffix drafter overwrite rows of the draft that vLLM's speculator has made.

vLLM verifies the same number of tokens for every request, and keeps no probabilities of a draft that takes its
likeliest tokens: its rejection sampler then takes any draft as certain, so the output keeps its distribution whichever
drafter made it (``installation.check_configuration`` rejects other drafts). The draft is overwritten before vLLM copies
it to the host, where grammars, penalties and forbidden words read it.

The suffix drafter needs the tokens of the step on the host. On a GPU it waits for them after the draft's kernels have
been queued, and the device drafts meanwhile.

Letters: B requests of the batch, n draft tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import structlog
import torch
from torch import Tensor

from serving.engines.plugin.capture import HostTransfer, PendingTensors
from serving.engines.plugin.metrics import SuffixMetrics
from serving.engines.plugin.row_drafter import RowDraft, RowDrafter
from serving.engines.plugin.trace_options import LABEL

log = structlog.get_logger()

Hook = TypeVar("Hook", bound=Callable[..., Any])


class _Sampled(NamedTuple):
    """Output tokens of a step on their way to the host."""

    names: list[str | None]
    """Request of each row; None where its prompt is not read to the end."""
    drafts: dict[str, RowDraft]
    """The drafts that were verified."""
    tokens: PendingTensors


def _contain(hook: Hook) -> Hook:
    """Turn the suffix drafter off at an error, which would end the server; the speculator drafts alone from then on."""

    @wraps(hook)
    def run(self: HybridHooks, *args: Any) -> Any:
        if self._is_off:
            return None
        try:
            return hook(self, *args)
        except Exception:
            self._is_off = True
            self._drafts, self._sampled = {}, None
            self._metrics.failures.inc()
            log.exception("aurora_suffix_drafter_failed", hook=hook.__name__)
            return None

    return run  # type: ignore[return-value]


class HybridHooks:
    """Hooks of one worker.

    Args:
        runner: vLLM's ``GPUModelRunner``, or its subclass for CPUs.
        drafter: The suffix drafter.
        transfer: Copies tensors to the host.
        metrics: Counters.
        version: Returns the version of the draft.
    """

    def __init__(
        self,
        runner: Any,
        drafter: RowDrafter,
        transfer: HostTransfer,
        metrics: SuffixMetrics,
        version: Callable[[], str],
    ) -> None:
        self._runner, self._drafter, self._transfer, self._version = runner, drafter, transfer, version
        self._metrics = metrics
        self._is_off = False
        self._drafts: dict[str, RowDraft] = {}
        """Drafts that no step has verified yet."""
        self._sampled: _Sampled | None = None

    def install(self) -> None:
        """Wrap the three methods of the runner."""
        runner = self._runner
        execute, sample, propose = runner.execute_model, runner._sample, runner.propose_draft_token_ids

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self.on_scheduled(scheduler_output)
            return execute(scheduler_output, *args, **kwargs)

        def sample_rows(logits: Any, spec_decode_metadata: Any) -> Any:
            result = sample(logits, spec_decode_metadata)
            self.on_sampled(result.sampled_token_ids)
            return result

        def propose_draft_token_ids(*args: Any, **kwargs: Any) -> Any:
            drafts_Bn = propose(*args, **kwargs)
            replaced_Bn = self.on_drafted(drafts_Bn)
            return drafts_Bn if replaced_Bn is None else replaced_Bn

        runner.execute_model, runner._sample = execute_model, sample_rows
        runner.propose_draft_token_ids = propose_draft_token_ids

    def verified_draft(self, name: str) -> RowDraft | None:
        """Return the draft of a request that the step verified whose tokens were sampled last."""
        return self._sampled.drafts.get(name) if self._sampled is not None else None

    @_contain
    def on_scheduled(self, scheduled: Any) -> None:
        """Note which requests have ended, begin, or continue after a pause."""
        self._read_output()
        for name in scheduled.finished_req_ids:
            self._drafts.pop(name, None)
            self._drafter.end(name)
        for new in scheduled.scheduled_new_reqs:
            if new.prompt_token_ids is not None and new.sampling_params is not None:
                sampling = new.sampling_params
                label = (sampling.extra_args or {}).get(LABEL)
                greedy = sampling.temperature == 0
                self._drafter.begin(
                    new.req_id, new.prompt_token_ids, None if label is None else str(label), greedy=greedy
                )
        # Requests that the last step left out: a preempted one may have lost tokens.
        for name, tokens in scheduled.scheduled_cached_reqs.all_token_ids.items():
            self._drafter.restart(name, tokens)

    @_contain
    def on_sampled(self, sampled: Tensor) -> None:
        """Start to copy the output to the host.

        Args:
            sampled: [B, m] accepted tokens and the bonus token of each request, then -1.
        """
        self._read_output()
        batch = self._runner.input_batch.req_ids
        discarded = self._runner.discard_request_mask.np
        names = [None if discarded[row] else name for row, name in enumerate(batch)]
        verified = {name: self._drafts.pop(name) for name in batch if name in self._drafts}
        self._sampled = _Sampled(names, verified, self._transfer.copy({"tokens": sampled}))

    @_contain
    def on_drafted(self, drafts_Bn: Tensor) -> Tensor | None:
        """Return the [B, n] draft with the rows of the suffix drafter; None if it has none."""
        sampled = self._sampled
        if sampled is None:
            return None
        self._read_output()
        pending = self._transfer.copy({"tokens": drafts_Bn})
        drafts = self._drafter.draft(sampled.names, pending, self._version())
        suffix_Bn = self._suffix_tokens(drafts, drafts_Bn)
        self._drafts |= drafts
        self._metrics.update(self._drafter.counts)
        return suffix_Bn

    def _read_output(self) -> None:
        """Wait for the output of the last step, and let the drafter learn from it once."""
        if self._sampled is None:
            return
        sampled, self._sampled = self._sampled, None
        tokens = sampled.tokens.wait()["tokens"].tolist()
        outputs = {
            name: [token for token in row if token >= 0]
            for name, row in zip(sampled.names, tokens, strict=False)
            if name is not None
        }
        self._drafter.observe(outputs, sampled.drafts)

    def _suffix_tokens(self, drafts: dict[str, RowDraft], drafts_Bn: Tensor) -> Tensor | None:
        chains = {draft.row: draft.chain.tokens for draft in drafts.values() if draft.is_preferred}
        if not chains:
            return None
        batch, depth = drafts_Bn.shape
        filled = [[*chains.get(row, ()), *[-1] * depth][:depth] for row in range(batch)]
        suffix_Bn = self._transfer.index([token for row in filled for token in row]).view(batch, depth)
        return torch.where(suffix_Bn >= 0, suffix_Bn.to(drafts_Bn.dtype), drafts_Bn)
