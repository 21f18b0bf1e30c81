"""Measures the latency of the target's forward and of the draft's steps on this machine, before the first request."""

from __future__ import annotations

from functools import partial

import structlog
import torch

from serving.engines.builtin.drafter import Drafter
from serving.engines.builtin.eagle_drafter import synthetic_sequence
from serving.engines.builtin.kernels import median_seconds, topk
from serving.engines.builtin.kv_cache import RaggedBatch, Segment
from serving.engines.builtin.target import Target
from serving.planner import AcceptanceModel, DraftBudget, LatencyCurve, LatencyModel

log = structlog.get_logger()

_VERIFY_ROWS = (1, 2, 4, 8, 16, 32)
_PREFIX = 64
"""Cached tokens of every sequence in a timed forward."""
_TRIALS = 3


def calibrate(target: Target, drafter: Drafter, slots: int) -> LatencyModel:
    """Return the measured latency model.

    Takes a second or two for a small target. Requests overwrite the entries it leaves in the KV caches.
    """
    with torch.inference_mode():
        verify = {rows: median_seconds(partial(_verify, target, slots, rows), _TRIALS) for rows in _VERIFY_ROWS}
        drafts = {}
        for sequences in sorted({1, min(4, slots), slots}):
            one = median_seconds(partial(_draft, target, drafter, sequences, 1), _TRIALS)
            three = median_seconds(partial(_draft, target, drafter, sequences, 3), _TRIALS)
            drafts[sequences] = (one, max((three - one) / 2, one / 10))
    log.info(
        "latency_calibrated",
        verify_ms={rows: round(seconds * 1e3, 2) for rows, seconds in verify.items()},
        draft_ms={sequences: [round(seconds * 1e3, 2) for seconds in steps] for sequences, steps in drafts.items()},
    )
    first, further = ({n: steps[i] for n, steps in drafts.items()} for i in (0, 1))
    return LatencyModel(LatencyCurve(verify), LatencyCurve(first), LatencyCurve(further))


def _verify(target: Target, slots: int, rows: int) -> None:
    """Run a forward as a verify step does: the rows spread over as many sequences as there are slots."""
    sequences = min(rows, slots)
    lengths = [rows // sequences + (i < rows % sequences) for i in range(sequences)]
    prefix = min(_PREFIX, target.cache.positions - max(lengths))
    batch = RaggedBatch([Segment(slot, prefix, length) for slot, length in enumerate(lengths)], target.device)
    tokens_T = torch.zeros(rows, dtype=torch.int64, device=target.device)
    # As in a verify step, the forward ends when the host has the target's choices.
    topk(target.logits(target.forward(tokens_T, batch).last_TH), 8).ids_Rk.cpu()


def _draft(target: Target, drafter: Drafter, sequences: int, depth: int) -> None:
    features_TF = torch.zeros(2, target.shape.feature_width, device=target.device)
    drafting = [synthetic_sequence([0, 0, 0], features_TF, slot=slot, room=depth + 1) for slot in range(sequences)]
    drafter.draft(drafting, DraftBudget(depth, acceptance={True: AcceptanceModel(depth)}))
