"""Hooks that let the suffix drafter overwrite rows of the draft that vLLM's speculator has made.

vLLM verifies the same number of tokens for every request, and keeps no probabilities of a draft that takes its
likeliest tokens: its rejection sampler then takes any draft as certain, so the output keeps its distribution whichever
drafter made it (``installation.check_configuration`` rejects other drafts). The draft is overwritten before vLLM copies
it to the host, where grammars, penalties and forbidden words read it.

Letters: B requests of the batch, n draft tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from serving.engines.plugin.capture import HostTransfer
from serving.engines.plugin.metrics import SuffixMetrics
from serving.engines.plugin.row_drafter import RowDrafter
from serving.engines.plugin.row_hooks import RowHooks, contain
from serving.engines.plugin.trace_options import LABEL


class HybridHooks(RowHooks):
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
        super().__init__(drafter, transfer, metrics, version)
        self._runner = runner

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

    @contain
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

    @contain
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
        self._keep_output(names, verified, sampled)

    @contain
    def on_drafted(self, drafts_Bn: Tensor) -> Tensor | None:
        """Return the [B, n] draft with the rows of the suffix drafter; None if it has none."""
        output = self._output
        if output is None:
            return None
        self._read_output()
        return self._draft_rows(output.names, drafts_Bn)
