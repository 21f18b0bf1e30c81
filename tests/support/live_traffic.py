"""Rows of the table ``traces`` for requests that versions served, as nodes and stream would write them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any

import pyarrow as pa

from schemas.batches import TRACES, day_of
from schemas.trace.record import DraftSource

_IDS = count()


@dataclass(frozen=True)
class ServedRequest:
    """A request whose verify steps are all alike."""

    version: str
    at: float
    """Unix time of its first verify step."""
    accepted: int = 1
    """Accepted tokens per step."""
    verify_steps: int = 10
    verify_step_s: float = 0.01
    label: str | None = None
    node: str = "node-0"
    line: str = "target-draft"
    drafted: bool = True
    sources: tuple[int, int, int] | None = None
    """Sources of the three draft tokens of each verify step."""
    swapped_to: str | None = None
    """The version that serves the second half of its verify steps."""
    start: float | None = None
    """Unix time of its prefill; None if it had just begun at ``at``, and NaN if unknown."""
    active_since: float = 0.0
    """Unix time at which its node swapped the first version in."""


def rows_of(requests: Iterable[ServedRequest]) -> pa.Table:
    """Return the prompt row and the verify steps of each request."""
    return pa.Table.from_pylist([row for request in requests for row in _rows(request)], schema=TRACES)


def _names_version(sources: tuple[int, int, int] | None) -> bool:
    return sources is None or any(source & DraftSource.SPECULATOR for source in sources)


def _to_us(time: float) -> int | None:
    return None if math.isnan(time) else round(time * 1e6)


def _rows(request: ServedRequest) -> list[dict[str, Any]]:
    number = next(_IDS)
    rows = []
    for at in range(request.verify_steps + 1):
        swapped = request.swapped_to if at > request.verify_steps / 2 else None
        drafted = 3 if at and request.drafted else 0
        swapped_at = request.at + request.verify_steps / 2 * request.verify_step_s
        active_since = request.active_since if swapped is None else swapped_at
        named = at and (not drafted or _names_version(request.sources))
        version = (swapped or request.version) if named else ""
        accepted = request.accepted if drafted else 0
        time_us = round((request.at + max(at - 1, 0) * request.verify_step_s) * 1e6)
        rows.append(
            {
                "topic": "traces",
                "partition": 0,
                "offset": number,
                "request": f"r-{number}",
                "chunk": 0,
                "node": request.node,
                "target": "t",
                "line": request.line,
                "label": request.label,
                "speculator": version,
                "time": time_us,
                "day": day_of(time_us),
                "last_chunk": True,
                "finish": "stop",
                "temperature": 0.0,
                "top_p": 1.0,
                "sampling_top_k": 0,
                "seed": None,
                "verify_step": at,
                "position": at * (accepted + 1),
                "tokens": [1] * (accepted + 1),
                "draft_tokens": [1] * drafted,
                "draft_parents": [-1, 0, 1][:drafted],
                "draft_logprobs": [-0.5] * drafted,
                "accepted": list(range(accepted)),
                "bonus": 1,
                "top_k": 0,
                "top_ids": [],
                "top_logprobs": [],
                "draft_us": round(request.verify_step_s * 2e5),
                "verify_us": round(request.verify_step_s * 8e5),
                "draft_sources": request.sources if drafted else None,
                "start_time": _to_us(request.at if request.start is None else request.start),
                "active_since": _to_us(active_since) if version else None,
            }
        )
    return rows
