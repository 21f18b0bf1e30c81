"""Tables in memory with Delta's guarantees, for models of the stream that crash, are fenced and read again."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.offsets import COMMIT_ORDER, NEVER_READ, ConflictError, SourcePartition
from schemas.batches import TABLES


class Crash(BaseException):
    """A crash of the process."""


def nothing() -> None:
    """Do nothing."""


@dataclass
class MemoryTable:
    """A table as a list of commits."""

    commits: list[pa.Table] = field(default_factory=list)
    transactions: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> list[tuple[int, int, str]]:
        """Return partition, offset and reason of every row."""
        rows = []
        for commit in self.commits:
            reasons = commit["reason"].to_pylist() if "reason" in commit.column_names else [""] * commit.num_rows
            rows += zip(commit["partition"].to_pylist(), commit["offset"].to_pylist(), reasons, strict=True)
        return rows

    def never_read(self, reason: str) -> list[int]:
        """Return the offsets that were recorded with a reason of ``NEVER_READ``."""
        letters = [row for commit in self.commits if "detail" in commit.column_names for row in commit.to_pylist()]
        details = [row["detail"].split(":")[0] for row in letters if row["reason"] == reason]
        runs = [map(int, run) for detail in details for run in re.findall(r"(\d+) to (\d+)", detail)]
        return [offset for first, last in runs for offset in range(first, last + 1)]


class MemorySnapshot:
    def __init__(self, table: MemoryTable, tables: MemoryTables) -> None:
        self._table, self._tables = table, tables
        self._version, self._transactions = len(table.commits), dict(table.transactions)

    def transaction(self, app_id: str) -> int | None:
        return self._transactions.get(app_id)

    def append(self, rows: pa.Table, transactions: Mapping[str, int]) -> None:
        self._tables.before_append()
        if len(self._table.commits) != self._version:
            raise ConflictError("the table has a newer version")
        self._table.commits.append(rows)
        self._table.transactions |= transactions
        self._tables.after_append()


class MemoryTables:
    """All tables. ``before_append`` runs between the check and the write of a commit, ``after_append`` after it."""

    def __init__(self) -> None:
        self.tables = {name: MemoryTable() for name in COMMIT_ORDER}
        self.before_append: Callable[[], None] = nothing
        self.after_append: Callable[[], None] = nothing

    def snapshot(self, name: str) -> MemorySnapshot:
        return MemorySnapshot(self.tables[name], self)

    def offsets(self, name: str) -> list[int]:
        return [offset for _, offset, reason in self.tables[name].rows if reason not in NEVER_READ]

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
