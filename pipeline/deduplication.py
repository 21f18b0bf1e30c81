"""Which records repeat one that was taken already: a producer that sent twice, or something that copies the topic.

A record is a piece of a request, (node, request, chunk), and the time of its last verify step tells it from another
piece of
that name. One that repeats a record taken at most ``window`` offsets before it in its partition is a dead letter.

What is remembered is a function of the log up to the wanted offset: exactly the records of the last ``window`` offsets
that have a row in ``accepted``. So it need not be kept anywhere; whenever it does not stand at the wanted offset (at
the start, after an assignment, and after a commit of which nobody knows whether it happened) it is read from the table.
Re-delivery then decides as the first delivery did, whoever decides and wherever runs are cut. ``accepted`` is committed
last, so that no other table is behind what is remembered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import pyarrow as pa

from pipeline.offsets import Source

K = TypeVar("K")

COLUMNS = ("offset", "node", "request", "chunk", "time")
"""Of ``accepted``: what tells which records were taken."""


class Identity(NamedTuple):
    """What is the same in a record and its repetition."""

    node: str
    request: str
    chunk: int
    time_us: int
    """Of the last verify step."""


class Taken(NamedTuple):
    """A record that has rows in ``accepted``."""

    source: Source
    offset: int
    identity: Identity


class Known:
    """Records that were taken, each for the next ``window`` offsets of its partition. A window of 0 knows none."""

    def __init__(self, window: int, taken: Iterable[Taken] = ()) -> None:
        self.window = window
        self._offsets: dict[tuple[Source, Identity], int] = {}
        self._pieces: dict[tuple[Source, str, str, int], int] = {}
        self.add(taken)

    def add(self, taken: Iterable[Taken]) -> None:
        """Remember records that follow those known before."""
        for source, offset, identity in taken:
            _renew(self._offsets, (source, identity), offset)
            _renew(self._pieces, (source, identity.node, identity.request, identity.chunk), offset)

    def forget_before(self, offset: int) -> None:
        """Let go what no record from ``offset`` on can repeat; all that is known is of one partition."""
        _shorten(self._offsets, offset - self.window)
        _shorten(self._pieces, offset - self.window)

    def repeats(self, record: Taken) -> int | None:
        """Offset of the record that this one repeats."""
        return self._within(self._offsets.get((record.source, record.identity)), record.offset)

    def follows(self, record: Taken) -> bool:
        """Whether the chunk before this one is known, or this one is the first."""
        source, offset, identity = record
        before = (source, identity.node, identity.request, identity.chunk - 1)
        return identity.chunk == 0 or self._within(self._pieces.get(before), offset) is not None

    def __len__(self) -> int:
        return len(self._offsets)

    def _within(self, known: int | None, offset: int) -> int | None:
        return known if known is not None and offset - self.window <= known < offset else None


NOTHING = Known(0)


class Tables(Protocol):
    """Where the rows of ``accepted`` are read from."""

    def read_offsets(self, name: str, source: Source, offsets: range, columns: Sequence[str]) -> pa.Table:
        """Rows that a range of one partition's records gave, in the order of their offsets."""


class Duplicates:
    """What is known of each partition, at the offset that its tables want next.

    Args:
        tables: Where the rows of ``accepted`` are.
        window: Offsets for which a record is remembered.
    """

    def __init__(self, tables: Tables, window: int) -> None:
        self._tables = tables
        self._window = window
        self._known: dict[Source, tuple[int, Known]] = {}

    def known(self, source: Source, wanted: int) -> Known:
        """What the records from offset ``wanted`` on can repeat."""
        at, known = self._known.get(source, (None, NOTHING))
        if at != wanted:
            offsets = range(max(0, wanted - self._window), wanted)
            rows = self._tables.read_offsets("accepted", source, offsets, COLUMNS)
            known = Known(self._window, _taken(source, rows))
            self._known[source] = wanted, known
        return known

    def keep(self, sources: Collection[Source]) -> None:
        """Let go what is known of other partitions than these."""
        self._known = {source: known for source, known in self._known.items() if source in sources}

    def committed(self, source: Source, wanted: int, taken: Iterable[Taken]) -> None:
        """Remember the records of a commit that succeeded, after which the tables want ``wanted``."""
        _, known = self._known[source]
        known.add(taken)
        known.forget_before(wanted)
        self._known[source] = wanted, known


def _taken(source: Source, rows: pa.Table) -> Iterator[Taken]:
    """The records that gave these rows of ``accepted``."""
    times = rows["time"].cast(pa.int64()).to_pylist()
    others = (rows[name].to_pylist() for name in COLUMNS[:-1])
    for offset, node, request, chunk, time_us in zip(*others, times, strict=True):
        yield Taken(source, offset, Identity(node, request, chunk, time_us))


def _renew(entries: dict[K, int], key: K, offset: int) -> None:
    """Out and in again, so that entries stand in the order of their offsets."""
    entries.pop(key, None)
    entries[key] = offset


def _shorten(entries: dict[K, int], first: int) -> None:
    while entries:
        key, offset = next(iter(entries.items()))
        if offset >= first:
            return
        del entries[key]
