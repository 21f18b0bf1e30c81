"""Import trace files into the tables with the code of the stream worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pipeline.batches import Record, build
from pipeline.delta import DeltaLog
from pipeline.offsets import Batch, OffsetCommitter, SourcePartition
from schemas.errors import UserError
from schemas.trace.decoder import decode
from schemas.trace.record import CONTENT_TYPE, SCHEMA_ID, TraceError

INDEX = "order.json"
"""File that lists the traces of a folder in order."""
TOPIC = "recorded"
REQUESTS_PER_COMMIT = 20
"""A commit of the stream holds the requests of a few seconds."""


def import_traces(log: DeltaLog, folder: Path, context_tokens: int) -> Iterator[tuple[int, int]]:
    """Commit each request of a folder once, in order; yield the imported and the total number after each commit.

    A request is a record of topic ``recorded``. As in the stream, the tables hold the next offset, so a second call
    continues where the first one ended.

    Raises:
        UserError: the folder has no index, or a file is not a trace.
        TableError: the tables cannot be written.
    """
    if not (folder / INDEX).exists():
        raise UserError(f"{folder}: no {INDEX}; `aurora bench learning --record 200` records traffic")
    names = [name for segment in json.loads((folder / INDEX).read_text())["segments"] for name in segment]
    log.create()
    committer, source = OffsetCommitter(log), SourcePartition(TOPIC, 0)
    start_offset = committer.next_offset(source)
    for start in range(start_offset, len(names), REQUESTS_PER_COMMIT):
        offsets = range(start, min(start + REQUESTS_PER_COMMIT, len(names)))
        built = build([read_record(folder, names[offset], offset) for offset in offsets], context_tokens)
        committer.commit([Batch(source, offsets[-1], built.rows)])
        yield offsets[-1] + 1, len(names)


def read_record(folder: Path, name: str, offset: int) -> Record:
    """Return a recorded request as a record of topic ``recorded``.

    Raises:
        UserError: the file is not a trace.
    """
    path = folder / f"{name}.trace"
    try:
        return as_record(name, path.read_bytes(), offset)
    except TraceError as error:
        raise UserError(f"{path}: {error}") from error


def as_record(name: str, value: bytes, offset: int) -> Record:
    """Return an encoded chunk of a request as a record of topic ``recorded``.

    Raises:
        TraceError: it is not a chunk.
    """
    verify_steps = decode(value).verify_steps
    headers = {"content-type": CONTENT_TYPE, "schema": SCHEMA_ID, "rows": str(len(verify_steps))}
    encoded = tuple((key, text.encode()) for key, text in headers.items())
    return Record(TOPIC, 0, offset, verify_steps[-1].time_us, name.encode(), value, encoded)
