"""Rows of the table ``traces`` for requests that versions served, written as nodes and the stream would have them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Any

import pyarrow as pa

from schemas.batches import TRACES, day_of

_IDS = count()


@dataclass(frozen=True)
class Answered:
    """A request of equal verify steps."""

    version: str
    at: float
    """Unix time of its first verify step."""
    kept: int = 1
    """Drafted tokens that each verify step keeps."""
    verify_steps: int = 10
    verify_step_s: float = 0.01
    label: str | None = None
    node: str = "node-0"
    line: str = "target-draft"
    drafted: bool = True
    swapped_to: str | None = None
    """The version that drafts the second half of its verify steps."""


def rows_of(requests: Iterable[Answered]) -> pa.Table:
    """A prompt and the verify steps of each request."""
    return pa.Table.from_pylist([row for request in requests for row in _rows(request)], schema=TRACES)


def _rows(request: Answered) -> list[dict[str, Any]]:
    number = next(_IDS)
    rows = []
    for at in range(request.verify_steps + 1):
        swapped = request.swapped_to if at > request.verify_steps / 2 else None
        version = (swapped or request.version) if at and request.drafted else ""
        kept = request.kept if version else 0
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
                "position": at * (kept + 1),
                "tokens": [1] * (kept + 1),
                "draft_tokens": [1] * (3 if version else 0),
                "draft_parents": [-1, 0, 1] if version else [],
                "draft_logprobs": [-0.5] * (3 if version else 0),
                "accepted": list(range(kept)),
                "bonus": 1,
                "top_k": 0,
                "top_ids": [],
                "top_logprobs": [],
                "draft_us": round(request.verify_step_s * 2e5),
                "verify_us": round(request.verify_step_s * 8e5),
            }
        )
    return rows
