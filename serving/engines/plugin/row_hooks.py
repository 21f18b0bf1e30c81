"""What the hooks of all servers share in which the suffix drafter overwrites rows of the speculator's draft.

The suffix drafter needs the tokens of a step on the host. On a GPU it waits for them after the draft's kernels have
been queued, and the device drafts meanwhile. An error of the suffix drafter turns it off, and no hook raises one.

Letters: B requests of the batch, n draft tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import structlog
import torch
from torch import Tensor

from serving.engines.plugin.capture import HostTransfer, PendingTensors
from serving.engines.plugin.metrics import SuffixMetrics
from serving.engines.plugin.row_drafter import RowDraft, RowDrafter

log = structlog.get_logger()

Hook = TypeVar("Hook", bound=Callable[..., Any])


class _Output(NamedTuple):
    """Output tokens of a step on their way to the host."""

    names: Sequence[str | None]
    """Request of each row; None where its prompt is not read to the end."""
    drafts: Mapping[str, RowDraft]
    """The drafts that were verified."""
    tokens: PendingTensors


def contain(hook: Hook) -> Hook:
    """Turn the suffix drafter off at an error, which would end the server; the speculator drafts alone from then on."""

    @wraps(hook)
    def run(self: RowHooks, *args: Any) -> Any:
        if self._is_off:
            return None
        try:
            return hook(self, *args)
        except Exception:
            self._is_off = True
            self._drafts, self._output = {}, None
            self._metrics.failures.inc()
            log.exception("aurora_suffix_drafter_failed", hook=hook.__name__)
            return None

    return run  # type: ignore[return-value]


class RowHooks:
    """State of the process that runs the steps.

    Args:
        drafter: The suffix drafter.
        transfer: Copies tensors to the host.
        metrics: Counters.
        version: Returns the version of the speculator's draft.
    """

    def __init__(
        self, drafter: RowDrafter, transfer: HostTransfer, metrics: SuffixMetrics, version: Callable[[], str]
    ) -> None:
        self._drafter, self._transfer, self._metrics, self._version = drafter, transfer, metrics, version
        self._is_off = False
        self._drafts: dict[str, RowDraft] = {}
        """Drafts that no step has verified yet."""
        self._output: _Output | None = None
        """Of the last step, until the drafter has learned from it."""

    def verified_draft(self, name: str) -> RowDraft | None:
        """Return the draft of a request that the step verified whose tokens were sampled last."""
        return self._output.drafts.get(name) if self._output is not None else None

    def _keep_output(self, names: Sequence[str | None], drafts: Mapping[str, RowDraft], tokens: Tensor) -> None:
        """Start to copy the output of a step to the host.

        Args:
            names: Request of each row; None where its prompt is not read to the end.
            drafts: Verified drafts by request.
            tokens: [B, m] accepted tokens and the bonus token of each request, then -1.
        """
        self._output = _Output(names, drafts, self._transfer.copy({"tokens": tokens}))

    def _read_output(self) -> None:
        """Wait for the output of the last step, and let the drafter learn from it once."""
        if self._output is None:
            return
        output, self._output = self._output, None
        rows = output.tokens.wait()["tokens"].tolist()
        found = {
            name: [token for token in row if token >= 0]
            for name, row in zip(output.names, rows, strict=False)
            if name is not None
        }
        self._drafter.observe(found, output.drafts)

    def _draft_rows(self, names: Sequence[str | None], speculator_Bn: Tensor) -> Tensor | None:
        """Draft, and return the [B, n] rows with the tokens of the suffix drafter; None if it has none.

        Args:
            names: Request of each row; None where its prompt is not read to the end.
            speculator_Bn: Chains of the speculator, in memory that is not written again.
        """
        pending = self._transfer.copy({"tokens": speculator_Bn})
        drafts = self._drafter.draft(names, pending, self._version())
        chains = {draft.row: draft.chain.tokens for draft in drafts.values() if draft.is_preferred}
        rows_Bn = self._overwrite(chains, speculator_Bn) if chains else None
        self._drafts |= drafts
        self._metrics.update(self._drafter.counts)
        return rows_Bn

    def _overwrite(self, chains: Mapping[int, Sequence[int]], speculator_Bn: Tensor) -> Tensor:
        batch, depth = speculator_Bn.shape
        filled = [[*chains.get(row, ()), *[-1] * depth][:depth] for row in range(batch)]
        suffix_Bn = self._transfer.index([token for row in filled for token in row]).view(batch, depth)
        return torch.where(suffix_Bn >= 0, suffix_Bn.to(speculator_Bn.dtype), speculator_Bn)
