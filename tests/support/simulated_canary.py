"""Rows of the table ``traces`` of a fleet that serves two sides in turn, under load that is not independent.

The sides are a canary and the champion, or the versions promoted since an anchor, one after the other, and the anchor.

Acceptance and load of a slice follow first-order autoregressive processes, one of the fleet and one of each node, and
so does the mix of two labels of very different acceptance. After a swap, verify steps accept less: for a while all of
them, and those of requests that began before it until they end.

Shapes: t slices, n nodes, q requests, r rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.delta import DeltaLog
from schemas.batches import TRACES
from schemas.trace.decoder import concat_ranges
from serving.versions.alias_policy import is_anchor_slice, is_canary_slice

F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
LINE, CHAMPION, CANARY = "target-draft", "1", "2"
"""The line and the versions of the sides; of the versions promoted since an anchor, the anchor and the first one."""
_DRAFTED = 3


@dataclass(frozen=True)
class Fleet:
    """The simulated fleet and its traffic."""

    nodes: int = 4
    slices: int = 120
    slice_s: float = 10.0
    share: float = 0.3
    """Of the slices that serve the canary or the anchor."""
    requests: float = 3.0
    """Mean number of requests that begin on a node in a slice."""
    verify_steps: float = 8.0
    """Mean of a request."""
    verify_step_s: float = 0.3
    autocorrelation: float = 0.95
    fleet_deviation: float = 0.2
    """Of the log of acceptance and of time per verify step, from slice to slice."""
    node_deviation: float = 0.1
    cold_s: float = 3.0
    """Time after a swap in which all verify steps accept less."""
    penalty: float = 0.5
    """Share of the acceptance that is lost after a swap."""


class SimulatedTables:
    """The table ``traces`` in memory, in one version."""

    def __init__(self, rows: pa.Table) -> None:
        self._rows = rows

    def version(self, _name: str) -> int:
        return 1

    def query(self, _sql: str, _at: Mapping[str, int]) -> list[pa.RecordBatch]:
        return list(self._rows.to_batches())


def simulate(fleet: Fleet, seed: int, gain: float, lifetime_s: float = math.inf) -> tuple[DeltaLog, float]:
    """Return the tables of one run, and the Unix time at which it begins.

    Args:
        fleet: The fleet and its traffic.
        seed: Of all draws.
        gain: Tokens per verify step of the newer side over those of the other.
        lifetime_s: Time after which a version of the newer side is replaced by the next; infinite for a canary.
    """
    random = np.random.default_rng(seed)
    first = 100_000_000 + seed * fleet.slices
    is_other = is_canary_slice if lifetime_s == math.inf else is_anchor_slice
    is_other_tn = np.array(
        [
            [is_other(f"node-{node}", first + at, fleet.share) for node in range(fleet.nodes)]
            for at in range(fleet.slices)
        ]
    )
    is_new_tn = is_other_tn if lifetime_s == math.inf else ~is_other_tn
    rows = _draw_rows(fleet, random, is_new_tn, gain, first * fleet.slice_s, lifetime_s)
    return cast(DeltaLog, SimulatedTables(rows)), first * fleet.slice_s


def _draw_rows(
    fleet: Fleet, random: np.random.Generator, is_new_tn: Bools, gain: float, begin: float, lifetime_s: float
) -> pa.Table:
    level_tn, load_tn = (_draw_levels(fleet, random) for _ in range(2))
    mix_t = 1 / (1 + np.exp(-_autoregress(random, (fleet.slices, 1), fleet.autocorrelation, 1.0)[:, 0]))
    slice_q, node_q = (
        np.repeat(at.ravel(), counts.ravel())
        for counts in [random.poisson(fleet.requests, is_new_tn.shape)]
        for at in np.indices(is_new_tn.shape)
    )
    count = len(slice_q)
    start_q = (slice_q + random.random(count)) * fleet.slice_s
    is_chat_q = random.random(count) < mix_t[slice_q]
    accepted_q = np.where(is_chat_q, 0.15, 0.6) * np.exp(random.normal(0, 0.2, count))
    pace_q = fleet.verify_step_s * np.exp(random.normal(0, 0.1, count))
    steps_q = 1 + random.poisson(fleet.verify_steps - 1, count)

    request_r = np.repeat(np.arange(count), steps_q)
    number_r = concat_ranges(np.ones(count, np.int64), steps_q)
    step_s_r = pace_q[request_r] * np.exp(load_tn[slice_q, node_q])[request_r]
    time_r = start_q[request_r] + (number_r - 1) * step_s_r
    kept = time_r < fleet.slices * fleet.slice_s
    request_r, number_r, step_s_r, time_r = request_r[kept], number_r[kept], step_s_r[kept], time_r[kept]
    slice_r, node_r = (time_r / fleet.slice_s).astype(np.int64), node_q[request_r]
    is_new_r, age_r = is_new_tn[slice_r, node_r], np.floor(time_r / lifetime_s).astype(np.int64)
    since_r = _active_since(is_new_tn)[slice_r, node_r] * fleet.slice_s
    since_r = np.where(is_new_r & (age_r > 0), np.maximum(since_r, age_r * min(lifetime_s, time_r.max())), since_r)
    is_cold_r = (time_r < since_r + fleet.cold_s) | (start_q[request_r] < since_r)
    chance_r = np.clip(accepted_q[request_r] * np.exp(level_tn[slice_r, node_r]), 0.03, 0.95)
    chance_r = np.where(is_cold_r & (since_r > 0), (1 - fleet.penalty) * chance_r, chance_r)
    chance_r = np.where(is_new_r, ((1 + _DRAFTED * chance_r) * gain - 1) / _DRAFTED, chance_r)
    accepted_r = random.binomial(_DRAFTED, np.clip(chance_r, 0, 1))
    return _to_table(
        {
            "speculator": np.where(is_new_r, (int(CANARY) + age_r).astype(str), CHAMPION),
            "label": np.where(is_chat_q[request_r], "chat", "code"),
            "node": np.char.add("node-", node_r.astype(str)),
            "time": ((begin + time_r) * 1e6).astype(np.int64),
            "start_time": ((begin + start_q[request_r]) * 1e6).astype(np.int64),
            "active_since": ((begin + since_r) * 1e6).astype(np.int64),
            "verify_step": number_r,
            "verify_us": (step_s_r * 1e6).astype(np.int64),
        },
        accepted_r,
    )


def _draw_levels(fleet: Fleet, random: np.random.Generator) -> F64:
    """Return [t, n] the sum of a process of the fleet and one of each node."""
    of_fleet = _autoregress(random, (fleet.slices, 1), fleet.autocorrelation, fleet.fleet_deviation)
    return of_fleet + _autoregress(random, (fleet.slices, fleet.nodes), fleet.autocorrelation, fleet.node_deviation)


def _autoregress(random: np.random.Generator, shape: tuple[int, int], autocorrelation: float, deviation: float) -> F64:
    """Return [t, ..] stationary processes."""
    values = random.normal(0, deviation, shape)
    for at in range(1, shape[0]):
        values[at] = autocorrelation * values[at - 1] + np.sqrt(1 - autocorrelation**2) * values[at]
    return values


def _active_since(is_new_tn: Bools) -> npt.NDArray[np.int64]:
    """Return [t, n] the slice at whose start the side of a slice was swapped in."""
    swapped = np.zeros(is_new_tn.shape, np.int64)
    swapped[1:] = np.where(is_new_tn[1:] != is_new_tn[:-1], np.arange(1, len(is_new_tn))[:, None], 0)
    since: npt.NDArray[np.int64] = np.maximum.accumulate(swapped, axis=0)
    return since


def _to_table(columns: Mapping[str, npt.NDArray[np.generic]], accepted_r: npt.NDArray[np.int64]) -> pa.Table:
    count = len(accepted_r)
    types = {field.name: field.type for field in TRACES}

    def lists(values: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.int16)))

    def arrays() -> Iterator[tuple[str, pa.Array]]:
        for name, values in columns.items():
            yield name, pa.array(values).cast(types[name])
        yield "line", pa.array([LINE] * count)
        yield "bonus", pa.array(np.ones(count, np.int32))
        yield "draft_us", pa.array(np.zeros(count, np.int32))
        yield "draft_parents", lists(np.tile(np.arange(-1, _DRAFTED - 1), count), np.full(count, _DRAFTED))
        yield "accepted", lists(concat_ranges(np.zeros(count, np.int64), accepted_r), accepted_r)
        yield "draft_sources", pa.nulls(count, types["draft_sources"])

    return pa.table(dict(arrays()))
