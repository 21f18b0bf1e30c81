"""What a pass of the target and a step of the draft take on this machine, measured before the first request."""

from __future__ import annotations

from functools import partial

import structlog
import torch

from serving.engines.base import Request
from serving.engines.builtin.drafter import Committed, Drafter
from serving.engines.builtin.kernels import likeliest, median_s
from serving.engines.builtin.kv_cache import RaggedBatch, Segment
from serving.engines.builtin.target import Target
from serving.planner import Acceptance, Costs, Curve, Plan

log = structlog.get_logger()

_VERIFY_ROWS = (1, 2, 4, 8, 16, 32)
_PREFIX = 64
"""Tokens that every request of a timed pass has behind it."""
_TRIALS = 3


def measure(target: Target, drafter: Drafter, slots: int) -> Costs:
    """Curves of seconds by rows. Takes a second or two for a small target; leaves the caches to be overwritten."""
    with torch.inference_mode():
        verify = {rows: median_s(partial(_verify, target, slots, rows), _TRIALS) for rows in _VERIFY_ROWS}
        drafts = {}
        for requests in sorted({1, min(4, slots), slots}):
            one = median_s(partial(_draft, target, drafter, requests, 1), _TRIALS)
            three = median_s(partial(_draft, target, drafter, requests, 3), _TRIALS)
            drafts[requests] = (one, max((three - one) / 2, one / 10))
    log.info(
        "costs_calibrated",
        verify_ms={rows: round(seconds * 1e3, 2) for rows, seconds in verify.items()},
        draft_ms={requests: [round(seconds * 1e3, 2) for seconds in steps] for requests, steps in drafts.items()},
    )
    first, further = ({n: steps[i] for n, steps in drafts.items()} for i in (0, 1))
    return Costs(Curve(verify), Curve(first), Curve(further))


def _verify(target: Target, slots: int, rows: int) -> None:
    """A pass as a verify step has it: the rows spread over as many requests as there are slots."""
    requests = min(rows, slots)
    lengths = [rows // requests + (i < rows % requests) for i in range(requests)]
    prefix = min(_PREFIX, target.cache.positions - max(lengths))
    batch = RaggedBatch([Segment(slot, prefix, length) for slot, length in enumerate(lengths)], target.device)
    tokens_T = torch.zeros(rows, dtype=torch.int64, device=target.device)
    # As in a verify step, the pass is over when the processor has what it decided.
    likeliest(target.logits(target.consume(tokens_T, batch).last_TH), 8).ids_Rk.cpu()


def _draft(target: Target, drafter: Drafter, requests: int, depth: int) -> None:
    features_TF = torch.zeros(2, target.shape.feature_width, device=target.device)
    request = Request("calibration", (0,), depth)
    generator = torch.Generator()
    committed = [Committed(slot, 0, features_TF, (0, 0), request, generator, depth) for slot in range(requests)]
    drafter.propose(committed, Plan(depth), {True: Acceptance(depth)})
