"""Detects duplicates: a record that a producer sent twice, or that something copied into the topic.

A record carries one chunk of a request. Its identity is (node, request, chunk) and the time of its last verify step. A
record that repeats one written at most ``window`` offsets before it in its partition becomes a dead letter.

The deduplication window is a function of the log up to the next offset: the records of the last ``window`` offsets
that have rows in ``traces``. It needs no storage of its own. If the cached window does not end at the next offset
(at the start, after an assignment, and after a commit whose outcome is unknown), it is read from the table. So a
redelivery decides as the first delivery did, in any worker and with any batch boundaries: up to the next offset every
table is complete.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.delta import DeltaLog
from pipeline.offsets import SourcePartition

K = TypeVar("K")

COLUMNS = ("offset", "node", "request", "chunk", "position", "time")
"""Columns of ``traces`` that identify a record, by its last verify step."""


class ChunkIdentity(NamedTuple):
    """Identity of a chunk; a duplicate has the same."""

    node: str
    request: str
    chunk: int
    time_us: int
    """Time of the last verify step."""


class WrittenRecord(NamedTuple):
    """A record with rows in ``traces``."""

    source: SourcePartition
    offset: int
    identity: ChunkIdentity


class DeduplicationWindow:
    """Written records, each remembered for the next ``size`` offsets of its partition. Size 0 detects no duplicates."""

    def __init__(self, size: int, records: Iterable[WrittenRecord] = ()) -> None:
        self.size = size
        self._offsets: dict[tuple[SourcePartition, ChunkIdentity], int] = {}
        self._chunks: dict[tuple[SourcePartition, str, str, int], int] = {}
        self.add(records)

    def add(self, records: Iterable[WrittenRecord]) -> None:
        """Add records that follow those in the window."""
        for source, offset, identity in records:
            _set_newest(self._offsets, (source, identity), offset)
            _set_newest(self._chunks, (source, identity.node, identity.request, identity.chunk), offset)

    def evict_before(self, next_offset: int) -> None:
        """Evict records that no record from ``next_offset`` on can repeat. The window must hold one partition only."""
        _evict(self._offsets, next_offset - self.size)
        _evict(self._chunks, next_offset - self.size)

    def find_duplicate(self, record: WrittenRecord) -> int | None:
        """Return the offset of the record that this one repeats; None if it repeats none."""
        return self._within(self._offsets.get((record.source, record.identity)), record.offset)

    def has_previous_chunk(self, record: WrittenRecord) -> bool:
        """Return whether the chunk before this one is in the window, or this one is the first of its request."""
        source, offset, identity = record
        previous = (source, identity.node, identity.request, identity.chunk - 1)
        return identity.chunk == 0 or self._within(self._chunks.get(previous), offset) is not None

    def __len__(self) -> int:
        return len(self._offsets)

    def _within(self, written: int | None, offset: int) -> int | None:
        return written if written is not None and offset - self.size <= written < offset else None


NO_DEDUPLICATION = DeduplicationWindow(0)


class Deduplicator:
    """Keeps the deduplication window of each partition at its next offset.

    Args:
        tables: Where the rows of ``traces`` are read from.
        window: Offsets for which a record is remembered.
    """

    def __init__(self, tables: DeltaLog, window: int) -> None:
        self._tables = tables
        self._size = window
        self._windows: dict[SourcePartition, tuple[int, DeduplicationWindow]] = {}

    def window(self, source: SourcePartition, next_offset: int) -> DeduplicationWindow:
        """Return the records that a record from ``next_offset`` on can repeat."""
        at, window = self._windows.get(source, (None, NO_DEDUPLICATION))
        if at != next_offset:
            offsets = range(max(0, next_offset - self._size), next_offset)
            rows = self._tables.read_offsets("traces", source, offsets, COLUMNS)
            window = DeduplicationWindow(self._size, read_written(source, rows))
            self._windows[source] = next_offset, window
        return window

    def retain(self, sources: Collection[SourcePartition]) -> None:
        """Drop the windows of all other partitions."""
        self._windows = {source: window for source, window in self._windows.items() if source in sources}

    def advance(self, source: SourcePartition, next_offset: int, written: Iterable[WrittenRecord]) -> None:
        """Add the records of a successful commit, and move the window to ``next_offset``."""
        _, window = self._windows[source]
        window.add(written)
        window.evict_before(next_offset)
        self._windows[source] = next_offset, window


def read_written(source: SourcePartition, rows: pa.Table) -> Iterator[WrittenRecord]:
    """Yield the records of rows of ``traces``, ordered by offset."""
    rows = rows.sort_by([("offset", "ascending"), ("position", "ascending")])
    offsets = rows["offset"].to_numpy()
    is_last = np.ones(len(offsets), np.bool_)
    is_last[:-1] = offsets[1:] != offsets[:-1]
    last = rows.filter(pa.array(is_last))
    times = last["time"].cast(pa.int64()).to_pylist()
    others = (last[name].to_pylist() for name in ("offset", "node", "request", "chunk"))
    for offset, node, request, chunk, time_us in zip(*others, times, strict=True):
        yield WrittenRecord(source, offset, ChunkIdentity(node, request, chunk, time_us))


def _set_newest(entries: dict[K, int], key: K, offset: int) -> None:
    """Set an entry and move it to the end: entries are in the order of their offsets."""
    entries.pop(key, None)
    entries[key] = offset


def _evict(entries: dict[K, int], first: int) -> None:
    while entries:
        key, offset = next(iter(entries.items()))
        if offset >= first:
            return
        del entries[key]
