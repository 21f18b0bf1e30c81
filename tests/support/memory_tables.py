"""Tables in memory with Delta's guarantees, for models of the stream that crash, are fenced and read again."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.offsets import COMMIT_ORDER, NEVER_READ, ConflictError, FencedError, SourcePartition
from schemas.batches import TABLES


class Crash(BaseException):
    """A crash of the process."""


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class MemoryCommit:
    """Rows and the transactions that were set with them."""

    rows: pa.Table
    transactions: Mapping[str, int]
    changes_columns: bool = False


@dataclass
class MemoryTable:
    """A table as a list of commits."""

    log: list[MemoryCommit] = field(default_factory=list)

    @property
    def commits(self) -> list[pa.Table]:
        """Return the rows of each commit."""
        return [commit.rows for commit in self.log]

    def change_columns(self) -> None:
        """Add a column, as another process does: a commit that was decided before is rejected."""
        self.log.append(MemoryCommit(pa.table({"partition": [], "offset": []}), {}, changes_columns=True))

    @property
    def rows(self) -> list[tuple[int, int, str]]:
        """Return partition, offset and reason of every row."""
        rows = []
        for commit in self.commits:
            reasons = commit["reason"].to_pylist() if "reason" in commit.column_names else [""] * commit.num_rows
            rows += zip(commit["partition"].to_pylist(), commit["offset"].to_pylist(), reasons, strict=True)
        return rows

    def never_read(self, reason: str, partition: int = 0) -> list[int]:
        """Return the offsets of a partition that were recorded with a reason of ``NEVER_READ``."""
        letters = [row for commit in self.commits if "detail" in commit.column_names for row in commit.to_pylist()]
        details = [
            row["detail"].split(":")[0] for row in letters if (row["reason"], row["partition"]) == (reason, partition)
        ]
        runs = [map(int, run) for detail in details for run in re.findall(r"(\d+) to (\d+)", detail)]
        return [offset for first, last in runs for offset in range(first, last + 1)]


class MemorySnapshot:
    """A version of a table, with the conflicts that Delta finds."""

    def __init__(self, table: MemoryTable, tables: MemoryTables) -> None:
        self._table, self._tables = table, tables
        self._version = len(table.log)

    def transaction(self, app_id: str) -> int | None:
        set_by = [commit.transactions for commit in self._table.log[: self._version] if app_id in commit.transactions]
        return set_by[-1][app_id] if set_by else None

    def append(self, rows: pa.Table, transactions: Mapping[str, int]) -> None:
        self._tables.before_append()
        since = self._table.log[self._version :]
        if any(commit.changes_columns for commit in since):
            raise ConflictError("metadata changed")
        if any(commit.transactions.keys() & transactions.keys() for commit in since):
            raise FencedError("another worker has set a transaction of this commit")
        self._table.log.append(MemoryCommit(rows, dict(transactions)))
        self._version = len(self._table.log)
        self._tables.after_append()


class MemoryTables:
    """All tables. ``before_append`` runs between the check and the write of a commit, ``after_append`` after it."""

    def __init__(self) -> None:
        self.tables = {name: MemoryTable() for name in COMMIT_ORDER}
        self.before_append: Callable[[], None] = nothing
        self.after_append: Callable[[], None] = nothing

    def snapshot(self, name: str) -> MemorySnapshot:
        return MemorySnapshot(self.tables[name], self)

    def offsets(self, name: str, partition: int = 0) -> list[int]:
        rows = self.tables[name].rows
        return [offset for of, offset, reason in rows if of == partition and reason not in NEVER_READ]

    def read(self, name: str) -> pa.Table:
        return pa.concat_tables([TABLES[name].empty_table(), *self.tables[name].commits])

    def read_offsets(self, name: str, source: SourcePartition, offsets: range, columns: Sequence[str]) -> pa.Table:
        rows = self.read(name).sort_by("offset")
        of_source = pc.and_(pc.equal(rows["topic"], source.topic), pc.equal(rows["partition"], source.partition))
        inside = pc.and_(pc.greater_equal(rows["offset"], offsets.start), pc.less(rows["offset"], offsets.stop))
        return rows.filter(pc.and_(of_source, inside)).select(columns)


def crash_after(steps: int) -> Callable[[], None]:
    """Return a step that crashes after ``steps`` calls."""
    left = steps

    def step() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Crash

    return step
