"""The newest verify steps of the ``traces`` table, and those that come after them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pyarrow as pa

from pipeline.delta import DeltaLog

SHOWN = (
    "time",
    "node",
    "request",
    "chunk",
    "verify_step",
    "speculator",
    "label",
    "draft_tokens",
    "accepted",
    "bonus",
)
_COMMITS = 4
"""Commits that are read at first; four times as many each time they hold too few verify steps."""


def newest(tables: DeltaLog, count: int) -> tuple[pa.Table, int]:
    """The last ``count`` verify steps in the order of their commits, and the version that they end with.

    Raises:
        TableError: the table cannot be read.
    """
    version, oldest = tables.version("traces"), tables.oldest("traces")
    commits = _COMMITS
    while True:
        start = max(oldest, version - commits)
        rows = tables.read_added("traces", start, version, SHOWN)
        if rows.num_rows >= count or start == oldest:
            return rows.slice(max(0, rows.num_rows - count)), version
        commits *= 4


def following(tables: DeltaLog, version: int, poll_s: float) -> Iterator[pa.Table]:
    """Verify steps of the commits after ``version`` as they come, without end.

    Raises:
        TableError: the table cannot be read.
    """
    while True:
        now = tables.version("traces")
        if now > version:
            yield tables.read_added("traces", version, now, SHOWN)
            version = now
        else:
            time.sleep(poll_s)
