"""Hooks that let the suffix drafter overwrite rows of the chains that SGLang's speculator has drafted.

The worker drafts, and then calls VERIFY with the draft in ``batch.spec_info``. Everything that reads the draft does so
after VERIFY has begun: the target, grammars, watermarks and the sampler. So a hook before VERIFY may put other tokens
there. The draft model reads the accepted tokens alone.

SGLang verifies the same number of tokens for every request of a batch; with ``--speculative-adaptive`` it changes from
step to step, down to none. Its sampler takes every draft as certain, so the output keeps its distribution whichever
drafter made the draft; with ``--speculative-use-rejection-sampling`` it compares with the probabilities of the
speculator, and no row is overwritten.

Letters: B requests of the batch, n draft tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from serving.engines.plugin.row_hooks import RowHooks, contain
from serving.engines.plugin.trace_options import LABEL
from serving.engines.sglang.plugin.trace_request import is_greedy


class ChainHooks(RowHooks):
    """Hooks of one scheduler process."""

    @contain
    def on_prefill(self, batch: Any, next_tokens: Tensor) -> None:
        """Follow the requests whose prompts were read to the end.

        Args:
            batch: SGLang's ``ScheduleBatch``.
            next_tokens: [B] token after each part of a prompt.
        """
        if batch.forward_mode.is_idle():
            return
        self._read_output()
        names: list[str | None] = []
        for req, start, length in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            # A request that was retracted reads its answer again, behind its prompt.
            tokens = [*req.origin_input_ids, *req.output_ids]
            is_read = start + length == len(tokens)
            names.append(req.rid if is_read else None)
            if is_read:
                sampling = req.sampling_params
                label = (sampling.custom_params or {}).get(LABEL)
                self._drafter.begin(req.rid, tokens, None if label is None else str(label), greedy=is_greedy(sampling))
        self._keep_output(names, {}, next_tokens.to(torch.int64, copy=True)[:, None])

    @contain
    def on_drafted(self, batch: Any) -> None:
        """Overwrite rows of the draft that the target verifies next."""
        self._read_output()
        self._drafts = {}
        drafted = batch.spec_info
        nodes = drafted.draft_token_num
        if batch.forward_mode.is_idle() or nodes == 1 or drafted.draft_probs is not None:
            return
        tokens = drafted.draft_token.view(-1, nodes)
        rows_Bn = self._draft_rows([req.rid for req in batch.reqs], tokens[:, 1:].clone())
        if rows_Bn is not None:
            drafted.draft_token = torch.cat([tokens[:, :1], rows_Bn], dim=1).view(-1)

    @contain
    def on_accepted(self, verify_input: Any, batch: Any, result: Any) -> None:
        """Start to copy the output to the host.

        Args:
            verify_input: SGLang's ``EagleVerifyInput``.
            batch: Its ``ScheduleBatch``.
            result: Result of ``eagle_sample``: the target's choice at each node, and the number of nodes up to the last
                accepted one. The accepted nodes of a chain are its first.
        """
        if batch.forward_mode.is_idle():
            return
        predicted, counts, _ = result
        nodes = verify_input.draft_token_num
        order_n = torch.arange(nodes, device=predicted.device)
        is_output = order_n < counts[:, None]
        tokens = torch.where(is_output, predicted.view(-1, nodes), torch.full_like(predicted.view(-1, nodes), -1))
        self._keep_output([req.rid for req in batch.reqs], self._drafts, tokens)

    @contain
    def on_release(self, req: Any) -> None:
        """Forget a request that has ended, or is retracted and read again."""
        self._drafter.end(req.rid)
