"""Exactly once: how Kafka offsets and Delta tables are kept in step. The tables are the truth; Kafka only delivers.

Every record ends up as rows of four tables, each row a function of that one record. Per table and source partition the
Delta log carries an application transaction ``<table>/<topic>/<partition>`` whose version is the last offset that the
table contains. Delta stores that number and guards nothing by itself, so this file does:

1. A table contains all records of a partition up to its transaction version, and none after it: rows and version move
   in one commit, and the next commit begins where the last one ended.
2. A commit happens only on the state it was decided on. The version is checked on a snapshot, and the write goes
   through that same snapshot, which Delta refuses if any commit came in between. Two owners of one partition can thus
   both believe in themselves; one of them is fenced.
3. The wanted offset of a partition is the lowest of its tables' next offsets. A crash between the commits of two
   tables leaves some ahead: records come again, and each table takes only those it does not contain yet.
4. A record behind the wanted offset is skipped, the wanted one is taken, one ahead of it is left out: the consumer
   skipped something, and has to seek back.
5. What the broker deleted before it was read is written down as lost, in the commit that moves past it.

This needs a topic whose offsets have no holes: no transactions, no compaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import DEAD_LETTERS, TABLES, day_of

COMMIT_ORDER = ("dead_letters", "rejected", "traces", "accepted")
"""``accepted`` last: whoever sees a row of it finds everything else of that record in place. The others in any order,
or at the same time."""
LOST = "lost_to_retention"
ATTEMPTS = 20
"""Tries of one commit while writers of other partitions take the table's next version first."""


class Source(NamedTuple):
    """A partition that records come from."""

    topic: str
    partition: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a run of records without holes, up to and with offset ``last``; ``rows`` has every committed table."""

    source: Source
    last: int
    rows: Mapping[str, pa.Table]


@dataclass(frozen=True, slots=True)
class Admission:
    """What to do with delivered records; the numbers in ``taken`` index them."""

    taken: tuple[int, ...]
    behind: int
    ahead: int
    gap: bool
    """The wanted record is not among them although later ones are: seek back to it."""


class ConflictError(RuntimeError):
    """The table has moved on since the snapshot was taken; nothing was written."""


class FencedError(RuntimeError):
    """Another owner has written records of this partition; what is known about its offsets is stale."""


class ForeignLogError(RuntimeError):
    """The topic is not the one that the tables were filled from."""


class Snapshot(Protocol):
    """One state of a table."""

    def transaction(self, app_id: str) -> int | None:
        """Version of an application transaction in this state."""

    def append(self, rows: pa.Table, transactions: Mapping[str, int]) -> None:
        """Add rows and set transaction versions, in one commit that directly follows this state.

        Raises:
            ConflictError: the table has left this state.
        """


Content = Callable[[Snapshot], tuple[pa.Table, dict[str, int]]]
"""What a commit adds to the state that it follows: rows, and transactions beside those of the source partitions."""


class Tables(Protocol):
    """The tables that records are written to."""

    def snapshot(self, name: str) -> Snapshot:
        """The newest state of a table."""


def admit(wanted: int, offsets: Sequence[int]) -> Admission:
    """Decide, record by record, what a table that wants offset ``wanted`` takes of ``offsets``."""
    taken: list[int] = []
    behind = ahead = 0
    gap = False
    for i, offset in enumerate(offsets):
        if offset == wanted:
            taken.append(i)
            wanted += 1
            gap = False
        elif offset < wanted:
            behind += 1
        else:
            ahead += 1
            gap = True
    return Admission(tuple(taken), behind, ahead, gap)


def lost_range(source: Source, wanted: int, log_start: int, log_end: int) -> range:
    """Offsets that the broker no longer has although the tables want them; empty in a healthy log.

    Raises:
        ForeignLogError: the log ends before the wanted offset, so what follows would be taken for known records.
    """
    if log_end < wanted:
        raise ForeignLogError(
            f"{source.topic}/{source.partition} ends at offset {log_end}, but the tables already hold records up to "
            f"{wanted - 1}: the topic was created anew, or kafka.bootstrap_servers names another broker. Set "
            f"kafka.traces_topic to a topic that the tables do not know, or tables.uri to tables of their own"
        )
    return range(wanted, max(wanted, log_start))


class Intake:
    """The tables' side of the protocol. Not thread-safe: one thread at a time decides and commits.

    What runs in a pool meanwhile is waited for: when ``commit`` returns or raises, nothing is being written any more.
    """

    def __init__(self, tables: Tables, pool: Executor | None = None) -> None:
        """With a ``pool`` all tables but the last are written at the same time."""
        self._tables = tables
        self._pool = pool
        self._next: dict[Source, dict[str, int]] = {}

    def wanted(self, source: Source) -> int:
        """Next offset that the tables want of a partition; read from them when it is not known."""
        if source not in self._next:
            self._next[source] = {
                name: _next_offset(self._tables.snapshot(name), name, source) for name in COMMIT_ORDER
            }
        return min(self._next[source].values())

    def forget(self, sources: Iterable[Source]) -> None:
        """Read the wanted offsets again before they are used: after an assignment, and after any failed commit."""
        for source in sources:
            self._next.pop(source, None)

    def commit(self, batches: Sequence[Batch]) -> None:
        """Write batches that begin at the wanted offsets of their partitions, one partition each.

        Raises:
            FencedError: another owner wrote; nothing is doubled, and the wanted offsets are read again.
            ConflictError: other writers were faster in every attempt; try again.
        """
        for batch in batches:
            self.wanted(batch.source)
        last = {batch.source: batch.last for batch in batches}
        try:
            self._each(COMMIT_ORDER[:-1], lambda name: self._append(name, batches, last))
            self._append(COMMIT_ORDER[-1], batches, last)
        except BaseException:
            # Whatever went wrong, and however far it got: only the tables know.
            self.forget(last)
            raise

    def _each(self, names: Sequence[str], write: Callable[[str], None]) -> None:
        """Write tables, and return or raise only when none is being written any more."""
        if self._pool is None:
            for name in names:
                write(name)
            return
        written = wait([self._pool.submit(write, name) for name in names]).done
        for done in written:
            done.result()

    def _append(self, name: str, batches: Sequence[Batch], last: Mapping[Source, int]) -> None:
        """Bring one table up to the ends of the batches."""
        rows = pa.concat_tables([TABLES[name].empty_table(), *(self._missing(name, batch) for batch in batches)])
        self._advance(name, last, _always(rows))

    def record_loss(self, source: Source, lost: range, time_us: int) -> None:
        """Write down that the broker deleted ``lost`` before it was read, and go on after it.

        A transaction of its own remembers how far losses are written down: ``dead_letters`` may have come further than
        the other tables, and a crash in between must not write one loss twice.
        """
        noted_id = f"dead_letters.lost/{source.topic}/{source.partition}"
        last = lost.stop - 1

        def note(snapshot: Snapshot) -> tuple[pa.Table, dict[str, int]]:
            noted = snapshot.transaction(noted_id)
            unnoted = range(lost.start if noted is None else max(lost.start, noted + 1), lost.stop)
            return _loss_rows(source, unnoted, time_us), {noted_id: max(last, -1 if noted is None else noted)}

        self.wanted(source)
        try:
            self._advance("dead_letters", {source: last}, note, even_if_ahead=True)
            for name in COMMIT_ORDER[1:]:
                self._advance(name, {source: last}, _always(TABLES[name].empty_table()))
        except BaseException:
            self.forget([source])
            raise

    def _missing(self, name: str, batch: Batch) -> pa.Table:
        """The rows of a batch that a table does not contain yet."""
        rows, wanted = batch.rows[name], self._next[batch.source][name]
        if not rows.num_rows or pc.min(rows["offset"]).as_py() >= wanted:
            return rows  # as they are: a filter copies them
        return rows.filter(pc.greater_equal(rows["offset"], wanted))

    def _advance(
        self,
        name: str,
        last: Mapping[Source, int],
        content: Content,
        *,
        even_if_ahead: bool = False,
    ) -> None:
        """Move one table to ``last``, with rows that may depend on the state they are added to: the fenced commit."""
        known = {source: self._next[source][name] for source in last}
        ends = {source: max(known[source], offset + 1) for source, offset in last.items()}
        if ends == known and not even_if_ahead:
            return
        conflict: ConflictError | None = None
        for _ in range(ATTEMPTS):
            snapshot = self._tables.snapshot(name)
            for source, expected in known.items():
                found = _next_offset(snapshot, name, source)
                if found != expected:
                    raise FencedError(
                        f"{name} wants offset {found} of {source.topic}/{source.partition}, not {expected}: "
                        f"another worker wrote there"
                    )
            rows, notes = content(snapshot)
            moved = {transaction_id(name, source): end - 1 for source, end in ends.items() if end > 0}
            try:
                snapshot.append(rows, {**moved, **notes})
            except ConflictError as error:
                conflict = error
                continue
            for source, end in ends.items():
                self._next[source][name] = end
            return
        raise ConflictError(f"{name}: other writers took the next version in each of {ATTEMPTS} attempts") from conflict


def transaction_id(table: str, source: Source) -> str:
    """Name of the application transaction that says how far a table has come in a partition."""
    return f"{table}/{source.topic}/{source.partition}"


def _always(rows: pa.Table) -> Content:
    return lambda _: (rows, {})


def _next_offset(snapshot: Snapshot, table: str, source: Source) -> int:
    last = snapshot.transaction(transaction_id(table, source))
    return 0 if last is None else last + 1


def _loss_rows(source: Source, lost: range, time_us: int) -> pa.Table:
    if not lost:
        return DEAD_LETTERS.empty_table()
    detail = (
        f"offsets {lost.start} to {lost.stop - 1}: the broker deleted {len(lost)} records before they were read; "
        f"keep them longer with kafka.retention"
    )
    row = {
        **dict.fromkeys(DEAD_LETTERS.names),
        "topic": source.topic,
        "partition": source.partition,
        "offset": lost.start,
        "time": time_us,
        "day": day_of(time_us),
        "reason": LOST,
        "detail": detail,
    }
    return pa.Table.from_pylist([row], schema=DEAD_LETTERS)
