"""Recorded traces, as the benchmarks keep them in files, brought into the tables by the stream's own code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pipeline.batches import Record, build
from pipeline.delta import DeltaLog
from pipeline.offsets import Batch, OffsetCommitter, SourcePartition
from schemas.errors import UserError
from schemas.trace.decoder import decode
from schemas.trace.record import CONTENT_TYPE, TraceError, fingerprint

INDEX = "order.json"
"""File with the request ids of a folder by segment, in the order in which they were sent."""
TOPIC = "recorded"
PER_COMMIT = 20
"""Requests: a commit stands for one of the stream, which brings what came in a few seconds."""


def bring(log: DeltaLog, folder: Path, context_tokens: int) -> Iterator[tuple[int, int]]:
    """Commit every request of a folder once, in its order; gives after each commit how many are in, of how many.

    A request is a record of the topic ``recorded``; as in the stream, the tables say how far they are, so that a second
    call goes on where the first ended.

    Raises:
        UserError: no recording in the folder, or a file that was altered.
        TableError: the tables cannot be written.
    """
    if not (folder / INDEX).exists():
        raise UserError(f"{folder}: no {INDEX}; `aurora bench learning --record 200` records traffic")
    names = [name for segment in json.loads((folder / INDEX).read_text())["segments"] for name in segment]
    log.create()
    committer, source = OffsetCommitter(log), SourcePartition(TOPIC, 0)
    begin = committer.next_offset(source)
    for start in range(begin, len(names), PER_COMMIT):
        some = range(start, min(start + PER_COMMIT, len(names)))
        built = build([read_record(folder, names[offset], offset) for offset in some], context_tokens)
        committer.commit([Batch(source, some[-1], built.rows)])
        yield some[-1] + 1, len(names)


def read_record(folder: Path, name: str, offset: int) -> Record:
    """Return the recorded request as a record of the topic ``recorded``.

    Raises:
        UserError: the file was altered.
    """
    path = folder / f"{name}.trace"
    value = path.read_bytes()
    try:
        verify_steps = decode(value).verify_steps
    except TraceError as error:
        raise UserError(f"{path}: {error}") from error
    headers = {"content-type": CONTENT_TYPE, "schema": fingerprint(), "rows": str(len(verify_steps))}
    told = tuple((key, text.encode()) for key, text in headers.items())
    return Record(TOPIC, 0, offset, verify_steps[-1].time_us, name.encode(), value, told)
