"""Measures the latency of the target's forward and of the speculator's draft steps on this machine, at start.

On a CPU it is measured in processor time: programs that take turns on the processor do not change what is compared, and
the planner's pace follows the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import structlog
import torch

from serving.engines.builtin.eagle_drafter import EagleDrafter, synthetic_sequence
from serving.engines.builtin.kernels import topk
from serving.engines.builtin.kv_cache import RaggedBatch, Segment
from serving.engines.builtin.target import Target
from serving.planner.acceptance_model import AcceptanceModel
from serving.planner.latency_model import LatencyCurve, LatencyModel
from serving.planner.planner import DraftBudget

log = structlog.get_logger()

_ROWS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 24, 32)
"""Fine where the tile of a matrix kernel may end."""
_PREFIX = 256
"""Cached tokens of every sequence in a timed forward: what another sequence costs is mostly reading them."""
_CATCH_UP = 128
"""Tokens that a timed draft reads beyond those of a short one."""
_TRIALS = 3


def calibrate(target: Target, speculator: EagleDrafter | None, slots: int) -> LatencyModel:
    """Return the measured latency model.

    Takes two or three seconds for a small target. Requests overwrite the entries it leaves in the KV caches.
    """
    counts = sorted({1, min(2, slots), min(4, slots), slots})
    row_counts = [rows for rows in _ROWS if rows < target.cache.positions]
    catch_up = min(_CATCH_UP, speculator.positions // 2) if speculator else _CATCH_UP
    with torch.inference_mode():
        # Memory that was never written reads as one cached page.
        target.cache.clear(slice(slots), slice(_PREFIX))
        fastest = _time_in_turns(
            {("rows", rows): partial(_verify, target, 1, rows) for rows in row_counts}
            | {("sequences", count): partial(_verify, target, count, count) for count in counts}
            | {
                (f"draft {depth}", count): partial(_draft, target, speculator, count, depth)
                for depth in (1, 3)
                for count in counts
                if speculator is not None
            }
            | (
                {("catch up", catch_up): partial(_draft, target, speculator, 1, 1, catch_up)}
                if speculator is not None
                else {}
            ),
            time.thread_time if target.device.type == "cpu" else time.perf_counter,
        )
    rows = {count: fastest["rows", count] for count in row_counts}
    for more, fewer in pairwise(reversed(row_counts)):
        rows[fewer] = min(rows[fewer], rows[more])
    curve = LatencyCurve(rows)
    sequences = {count: max(fastest["sequences", count] - curve.predict(count), 0.0) for count in counts}
    first = {count: fastest.get(("draft 1", count), 0.0) for count in counts}
    further = {
        count: max((fastest.get(("draft 3", count), 0.0) - step) / 2, step / 10) for count, step in first.items()
    }
    longer = fastest.get(("catch up", catch_up), 0.0)
    read = {catch_up: max(longer - first[1], longer / 10)}
    log.info(
        "latency_calibrated",
        **{
            name: {count: round(seconds * 1e3, 2) for count, seconds in knots.items()}
            for name, knots in (
                ("rows_ms", rows),
                ("sequences_ms", sequences),
                ("first_draft_step_ms", first),
                ("further_draft_step_ms", further),
                ("catch_up_ms", read),
            )
        },
    )
    return LatencyModel(
        curve, LatencyCurve(sequences), LatencyCurve(first), LatencyCurve(further), read[catch_up] / catch_up
    )


def _time_in_turns(
    calls: Mapping[tuple[str, int], Callable[[], object]], clock: Callable[[], float]
) -> dict[tuple[str, int], float]:
    """Return the shortest duration of each call, in seconds of ``clock``.

    All calls have a turn before the next trial, so that another process, which slows the machine down for a while,
    slows down one trial of each rather than all trials of one.
    """
    seconds: dict[tuple[str, int], list[float]] = {name: [] for name in calls}
    for _ in range(1 + _TRIALS):
        for name, call in calls.items():
            started = clock()
            call()
            seconds[name].append(clock() - started)
    return {name: min(trials[1:]) for name, trials in seconds.items()}


def _verify(target: Target, sequences: int, rows: int) -> None:
    """Run a forward as a verify step does, with rows of the given number of sequences."""
    prefix = min(_PREFIX, target.cache.positions - rows)
    batch = RaggedBatch([Segment(slot, prefix, rows // sequences) for slot in range(sequences)], target.device)
    tokens_T = torch.zeros(rows, dtype=torch.int64, device=target.device)
    # As in a verify step, the forward ends when the host has the target's choices.
    topk(target.logits(target.forward(tokens_T, batch).last_TH), 8).ids_Rk.cpu()


def _draft(target: Target, speculator: EagleDrafter, sequences: int, depth: int, catch_up: int = 0) -> None:
    rows = 2 + catch_up
    features_TF = torch.zeros(rows, target.shape.feature_width, device=target.device)
    drafting = [
        synthetic_sequence([0] * (rows + 1), features_TF, slot=slot, room=depth + 1) for slot in range(sequences)
    ]
    speculator.draft(drafting, DraftBudget(depth), {True: AcceptanceModel()})
