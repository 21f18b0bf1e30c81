"""Measures the latency of the target's forward and of the speculator's draft steps on this machine, at start."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise

import structlog
import torch

from serving.engines.builtin.eagle_drafter import EagleDrafter, synthetic_sequence
from serving.engines.builtin.kernels import median_seconds, topk
from serving.engines.builtin.kv_cache import RaggedBatch, Segment
from serving.engines.builtin.target import Target
from serving.planner import AcceptanceModel, DraftBudget, LatencyCurve, LatencyModel

log = structlog.get_logger()

_VERIFY_ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
"""Fine where a matrix kernel's tile may end."""
_PREFIX = 64
"""Cached tokens of every sequence in a timed forward."""
_TRIALS = 3


def calibrate(target: Target, speculator: EagleDrafter | None, slots: int) -> LatencyModel:
    """Return the measured latency model.

    Takes a second or two for a small target. Requests overwrite the entries it leaves in the KV caches.
    """
    with torch.inference_mode():
        verify = {rows: median_seconds(partial(_verify, target, 1, rows), _TRIALS) for rows in _VERIFY_ROWS}
        for more, fewer in pairwise(reversed(_VERIFY_ROWS)):
            verify[fewer] = min(
                verify[fewer], verify[more]
            )  # more rows never take less time: another process interfered
        rows = LatencyCurve(verify)
        spread = {1: 0.0}
        drafts = {1: (0.0, 0.0)}
        for sequences in sorted({min(2, slots), min(4, slots), slots}):
            seconds = median_seconds(partial(_verify, target, sequences, sequences), _TRIALS)
            spread.setdefault(sequences, max(seconds - rows.predict(sequences), 0.0))
        if speculator is not None:
            for sequences in sorted({1, min(4, slots), slots}):
                one = median_seconds(partial(_draft, target, speculator, sequences, 1), _TRIALS)
                three = median_seconds(partial(_draft, target, speculator, sequences, 3), _TRIALS)
                drafts[sequences] = (one, max((three - one) / 2, one / 10))
    log.info(
        "latency_calibrated",
        verify_ms=_in_ms(verify),
        sequences_ms=_in_ms(spread),
        draft_ms={sequences: [round(seconds * 1e3, 2) for seconds in steps] for sequences, steps in drafts.items()},
    )
    first, further = ({n: steps[i] for n, steps in drafts.items()} for i in (0, 1))
    return LatencyModel(rows, LatencyCurve(spread), LatencyCurve(first), LatencyCurve(further))


def _verify(target: Target, sequences: int, rows: int) -> None:
    """Run a forward as a verify step does, with rows of the given number of sequences."""
    prefix = min(_PREFIX, target.cache.positions - rows)
    batch = RaggedBatch([Segment(slot, prefix, rows // sequences) for slot in range(sequences)], target.device)
    tokens_T = torch.zeros(rows, dtype=torch.int64, device=target.device)
    # As in a verify step, the forward ends when the host has the target's choices.
    topk(target.logits(target.forward(tokens_T, batch).last_TH), 8).ids_Rk.cpu()


def _draft(target: Target, speculator: EagleDrafter, sequences: int, depth: int) -> None:
    features_TF = torch.zeros(2, target.shape.feature_width, device=target.device)
    drafting = [synthetic_sequence([0, 0, 0], features_TF, slot=slot, room=depth + 1) for slot in range(sequences)]
    speculator.draft(drafting, DraftBudget(depth), {True: AcceptanceModel()})


def _in_ms(seconds: Mapping[int, float]) -> dict[int, float]:
    return {count: round(value * 1e3, 2) for count, value in seconds.items()}
