"""The exactly-once protocol between Kafka offsets and Delta tables. The tables are the truth; Kafka only delivers.

Each record becomes rows of four tables, and every row is a function of that one record. For each table and source
partition the Delta log carries an application transaction ``<table>/<topic>/<partition>``. Its version is an offset:
the table contains the rows of all records up to it, and none of a later record. These rules keep it so:

1. Rows and version change in one commit, and a commit adds only rows behind the version that it replaces.
2. A worker decides on the version that it knows, and commits through the table handle with which it learned it. Delta
   rejects the commit if any commit since has set the same transaction, and puts it behind all others: they concern
   other partitions. If two workers believe that they own a partition, one of them is fenced.
3. The next offset of a partition follows the version of ``accepted``, which is committed last, and for every batch. The
   other tables are committed only if they get rows. So a table may lag behind ``accepted``: the records between have no
   rows in it. After a crash between the commits of two tables it may be ahead: the records are delivered again, and
   each table adds only the rows that it lacks.
4. A record below the next offset is skipped, the record at the next offset is selected, and a record above it is
   deferred: the consumer jumped over records and must seek back.
5. Records that the broker deleted before they were read are recorded as lost, in the commit that moves past them.
6. A hole is a run of offsets at which no consumer receives a record: the end of a transaction takes an offset, and so
   do the records of an aborted one. A second consumer confirms a hole, and the commit that moves past it records it.

The protocol needs a topic without compaction: there, a hole may have been a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from schemas.batches import DEAD_LETTERS, TABLES, day_of

COMMIT_ORDER = ("dead_letters", "rejected", "traces", "accepted")
"""``accepted`` is committed last: what it contains, the other tables contain. They may be committed in any order, or at
the same time."""
LAST_TABLE = COMMIT_ORDER[-1]
LOST_TO_RETENTION = "lost_to_retention"
SKIPPED = "skipped"
HOLE = "hole"
TOPIC_RECREATED = "topic_recreated"
NEVER_READ = (LOST_TO_RETENTION, SKIPPED, HOLE, TOPIC_RECREATED)
"""Reasons of rows in ``dead_letters`` that stand for offsets, not for a record."""
MAX_ATTEMPTS = 5
"""Attempts of one commit, each with a new upload, while others change the table's columns or exhaust its retries."""


_LOG_SEPARATOR = "@"
"""No topic on a broker has it in its name."""


class SourcePartition(NamedTuple):
    """A Kafka partition that records are read from."""

    topic: str
    """The topic's name in the tables: ``pipeline.topic_logs`` gives each log of a topic one of its own."""
    partition: int

    @property
    def broker_topic(self) -> str:
        """The topic's name on the broker."""
        return self.topic.partition(_LOG_SEPARATOR)[0]


def log_name(topic: str, number: int) -> str:
    """Return the name in the tables of a topic's log."""
    return topic if number == 1 else f"{topic}{_LOG_SEPARATOR}{number}"


class LogRange(NamedTuple):
    """Offsets of a partition on the broker: from ``start`` up to, but not including, ``end``."""

    start: int
    stable_end: int
    """Consumers receive records up to this offset. It is below ``end`` while a transaction is open."""
    end: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a run of records up to and including ``last_offset``. ``rows`` has every table of ``COMMIT_ORDER``."""

    source: SourcePartition
    last_offset: int
    rows: Mapping[str, pa.Table]
    holes: tuple[range, ...] = ()
    """Holes between the records, or behind the last one. The commit adds the row that records them."""
    time_us: int = 0
    """Unix time of that row, in microseconds."""


@dataclass(frozen=True, slots=True)
class RecordSelection:
    """Decision about delivered records. ``selected`` holds their indices."""

    selected: tuple[int, ...]
    skipped: int
    """Records below the next offset: the tables contain them."""
    deferred: int
    """Records above the next offset: the broker delivers them again."""
    has_gap: bool
    """True if later records were delivered without the record at the next offset: the consumer must seek back."""
    holes: tuple[range, ...] = ()
    """Holes between the selected records."""


class ConflictError(RuntimeError):
    """The table has changed in another way than by added rows, or too often. Nothing was written."""


class FencedError(RuntimeError):
    """Another worker has written records of this partition. The cached offsets are stale."""


class ForeignLogError(RuntimeError):
    """The topic is not the one that the tables were filled from."""


CUT_LOG = (
    "the log was cut (by an unclean leader election, or by restoring a broker's disk), or is another one on a broker "
    "without topic ids (kafka.bootstrap_servers). Restore the log; or stop all workers and run `aurora stream "
    "new-log`: they will read the topic from its start, under another name in the tables"
)
"""What happened, and what to do, where a log lacks records that the tables have."""


class Snapshot(Protocol):
    """A handle on one version of a table. It moves with its own commits."""

    def transaction(self, app_id: str) -> int | None:
        """Return the version of an application transaction in this snapshot."""

    def append(self, rows: pa.Table, transactions: Mapping[str, int]) -> None:
        """Add rows and set transaction versions in one commit, and move the snapshot behind it.

        Raises:
            FencedError: a commit after this snapshot has set one of these transactions.
            ConflictError: nothing was written for another reason. Try again on a new snapshot.
        """


CommitContent = Callable[[Snapshot], tuple[pa.Table, dict[str, int]]]
"""Returns what a commit adds to a snapshot: rows, and transactions other than those of the source partitions."""


class SnapshotStore(Protocol):
    """The tables that records are written to."""

    def snapshot(self, name: str) -> Snapshot:
        """Return a snapshot of the newest version of a table."""


def select_records(next_offset: int, offsets: Sequence[int], holes: Sequence[range] = ()) -> RecordSelection:
    """Decide for each of ``offsets`` whether its record is selected, skipped or deferred. ``holes`` are confirmed."""
    selected: list[int] = []
    passed: list[range] = []
    ahead: list[range] = []
    skipped = deferred = 0
    has_gap = False
    for i, offset in enumerate(offsets):
        while offset > next_offset and (hole := next((hole for hole in holes if next_offset in hole), None)):
            ahead.append(range(next_offset, min(hole.stop, offset)))
            next_offset = ahead[-1].stop
        if offset == next_offset:
            selected.append(i)
            passed, ahead = [*passed, *ahead], []
            next_offset += 1
            has_gap = False
        elif offset < next_offset:
            skipped += 1
        else:
            deferred += 1
            has_gap = True
    return RecordSelection(tuple(selected), skipped, deferred, has_gap, tuple(passed))


def find_gaps(next_offset: int, offsets: Iterable[int]) -> list[range]:
    """Return the runs of offsets from the next one on that are missing before the last of ``offsets``, in order."""
    delivered = sorted({offset for offset in offsets if offset >= next_offset})
    return [range(before + 1, after) for before, after in pairwise([next_offset - 1, *delivered]) if after > before + 1]


def find_lost_offsets(source: SourcePartition, next_offset: int, log_start: int, log_end: int) -> range:
    """Return the offsets that the broker deleted before the tables contained them; empty in a healthy log.

    Raises:
        ForeignLogError: the log ends before the next offset, so new records would be skipped as known ones.
    """
    if log_end < next_offset:
        raise ForeignLogError(
            f"{source.topic}/{source.partition} ends at offset {log_end}, but the tables already contain records up to "
            f"{next_offset - 1}: {CUT_LOG}"
        )
    return range(next_offset, max(next_offset, log_start))


class OffsetCommitter:
    """Commits batches to the tables. Not thread-safe: one thread at a time decides and commits.

    Writes that run in the pool are awaited: no write is in progress when ``commit`` returns or raises.
    """

    def __init__(self, tables: SnapshotStore, pool: Executor | None = None) -> None:
        """With a ``pool`` all tables but the last are written at the same time."""
        self._tables = tables
        self._pool = pool
        self._snapshots: dict[str, Snapshot] = {}
        self._next: dict[SourcePartition, dict[str, int]] = {}
        """By table, the offset from which on it has no rows."""

    def next_offset(self, source: SourcePartition) -> int:
        """Return the next offset of a partition. Read it from the tables if it is not cached."""
        if source not in self._next:
            self._next[source] = {name: _read_next_offset(self._snapshot(name), name, source) for name in COMMIT_ORDER}
        return self._next[source][LAST_TABLE]

    def invalidate(self, sources: Iterable[SourcePartition]) -> None:
        """Drop cached offsets, so that they are read again: after an assignment, and after any failed commit."""
        self._snapshots.clear()
        for source in sources:
            self._next.pop(source, None)

    def commit(self, batches: Sequence[Batch]) -> tuple[str, ...]:
        """Write batches that begin at the next offsets of their partitions, at most one batch for each partition.

        Returns:
            The tables that were committed.

        Raises:
            FencedError: another worker wrote. No row is duplicated, and the next offsets are read again.
            ConflictError: others changed the table in every attempt. Try again.
        """
        sources = [batch.source for batch in batches]
        for source in sources:
            self.next_offset(source)
        try:
            missing = {name: self._missing_rows(name, batches) for name in COMMIT_ORDER}
            with_rows = [name for name in COMMIT_ORDER[:-1] if missing[name]]
            last = {batch.source: batch.last_offset for batch in batches}
            self._for_each(with_rows, lambda name: self._append(name, missing[name], last))
            self._append(LAST_TABLE, missing[LAST_TABLE], last, move=sources)
        except BaseException:
            # Only the tables know how far the commit got.
            self.invalidate(sources)
            raise
        return (*with_rows, LAST_TABLE)

    def record_loss(
        self, source: SourcePartition, lost: range, time_us: int, reason: str = LOST_TO_RETENTION, why: str = ""
    ) -> None:
        """Record that the records at ``lost`` will not be read, and move past them.

        Args:
            source: Their partition.
            lost: Offsets from the next one on.
            time_us: Unix time of the row that records it, in microseconds.
            reason: ``LOST_TO_RETENTION`` or ``SKIPPED``.
            why: What the row says beside the offsets. By default, that the broker deleted the records.

        A separate transaction holds the last offset that is recorded as lost. After a crash ``dead_letters`` may be
        ahead of the other tables, and the loss must not be recorded twice.
        """
        loss_id = f"dead_letters.lost/{source.topic}/{source.partition}"
        last = lost.stop - 1

        def loss_rows(snapshot: Snapshot) -> tuple[pa.Table, dict[str, int]]:
            recorded = snapshot.transaction(loss_id)
            unrecorded = range(lost.start if recorded is None else max(lost.start, recorded + 1), lost.stop)
            rows = _build_offset_rows(source, [unrecorded], time_us, reason, why or _deleted(unrecorded))
            return rows, {loss_id: max(last, -1 if recorded is None else recorded)}

        self.next_offset(source)
        try:
            self._advance("dead_letters", {source: last}, loss_rows)
            self._append(LAST_TABLE, {}, {source: last}, move=[source])
        except BaseException:
            self.invalidate([source])
            raise

    def _snapshot(self, name: str) -> Snapshot:
        """Return the snapshot of a table through which it is committed; a new one after ``invalidate``."""
        if name not in self._snapshots:
            self._snapshots[name] = self._tables.snapshot(name)
        return self._snapshots[name]

    def _for_each(self, names: Sequence[str], write: Callable[[str], None]) -> None:
        """Write tables. Return or raise only when no write is in progress."""
        if self._pool is None:
            for name in names:
                write(name)
            return
        for done in wait([self._pool.submit(write, name) for name in names]).done:
            done.result()

    def _append(
        self,
        name: str,
        rows: Mapping[SourcePartition, pa.Table],
        last: Mapping[SourcePartition, int],
        *,
        move: Iterable[SourcePartition] = (),
    ) -> None:
        """Add the rows of some partitions to one table, and move it to the ends of their batches; also those of
        ``move``, without rows."""
        added = pa.concat_tables([TABLES[name].empty_table(), *rows.values()])
        self._advance(name, {source: last[source] for source in {*rows, *move}}, lambda _: (added, {}))

    def _missing_rows(self, name: str, batches: Iterable[Batch]) -> dict[SourcePartition, pa.Table]:
        """Return the rows of batches that a table does not contain yet, of the partitions with such rows."""
        missing = {batch.source: self._missing_of_batch(name, batch) for batch in batches}
        return {source: rows for source, rows in missing.items() if rows.num_rows}

    def _missing_of_batch(self, name: str, batch: Batch) -> pa.Table:
        rows, next_offset = batch.rows[name], self._next[batch.source][name]
        if rows.num_rows and pc.min(rows["offset"]).as_py() < next_offset:  # a filter copies the rows
            rows = rows.filter(pc.greater_equal(rows["offset"], next_offset))
        if name != "dead_letters" or not batch.holes:
            return rows
        holes = [range(max(hole.start, next_offset), hole.stop) for hole in batch.holes]
        why = "no consumer receives a record there: these are ends of transactions, or records of aborted ones"
        return pa.concat_tables([rows, _build_offset_rows(batch.source, holes, batch.time_us, HOLE, why)])

    def _advance(self, name: str, last: Mapping[SourcePartition, int], content: CommitContent) -> None:
        """Move one table to ``last`` in a fenced commit. The rows may depend on the snapshot they are added to."""
        known = {source: self._next[source][name] for source in last}
        ends = {source: max(known[source], offset + 1) for source, offset in last.items()}
        snapshot, conflict = self._snapshot(name), ConflictError()
        for _ in range(MAX_ATTEMPTS):
            for source, expected in known.items():
                found = _read_next_offset(snapshot, name, source)
                if found != expected:
                    raise FencedError(
                        f"{name}: the next offset of {source.topic}/{source.partition} is {found}, not {expected}: "
                        f"another worker wrote there"
                    )
            rows, transactions = content(snapshot)
            if not rows.num_rows and (name != LAST_TABLE or ends == known):
                return
            moved = {transaction_id(name, source): end - 1 for source, end in ends.items() if end > 0}
            try:
                snapshot.append(rows, {**moved, **transactions})
            except ConflictError as error:
                conflict = error
                snapshot = self._snapshots[name] = self._tables.snapshot(name)
                continue
            for source, end in ends.items():
                self._next[source][name] = end
            return
        raise ConflictError(f"{name}: others changed the table in each of {MAX_ATTEMPTS} attempts") from conflict


def transaction_id(table: str, source: SourcePartition) -> str:
    """Return the name of the application transaction that holds the last offset of a partition in a table."""
    return f"{table}/{source.topic}/{source.partition}"


def _read_next_offset(snapshot: Snapshot, table: str, source: SourcePartition) -> int:
    last = snapshot.transaction(transaction_id(table, source))
    return 0 if last is None else last + 1


def _build_offset_rows(
    source: SourcePartition, offsets: Sequence[range], time_us: int, reason: str, why: str
) -> pa.Table:
    """Return the one row that stands for runs of offsets whose records are not in the tables; none without offsets."""
    runs = [run for run in offsets if run]
    if not runs:
        return DEAD_LETTERS.empty_table()
    row = {
        **dict.fromkeys(DEAD_LETTERS.names),
        "topic": source.topic,
        "partition": source.partition,
        "offset": runs[0].start,
        "time": time_us,
        "day": day_of(time_us),
        "reason": reason,
        "detail": f"offsets {', '.join(f'{run.start} to {run.stop - 1}' for run in runs)}: {why}",
    }
    return pa.Table.from_pylist([row], schema=DEAD_LETTERS)


def _deleted(lost: range) -> str:
    return f"the broker deleted {len(lost)} records before they were read; keep them longer with kafka.retention"
