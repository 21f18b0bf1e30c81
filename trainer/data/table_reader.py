"""Reads the tables ``accepted`` and ``rejected`` version by version, and joins branches to their windows.

Branches are joined to their window by the Kafka record that both came from. ``rejected`` is committed before
``accepted``, a record's rows lie in one commit, and commits keep the order of offsets in each partition. So
``rejected`` is read until every window's record is passed, or to its newest version; rows of records whose windows are
not read yet wait for the next read.

Maintenance deletes what nobody has asked for in a long time. A reader that comes so late passes over what is gone, and
counts it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import structlog

from pipeline.delta import HistoryExpiredError
from trainer.data.replay_sampler import version_number
from trainer.data.rows import ACCEPTED_COLUMNS, REJECTED_COLUMNS, Row, has_beginning, has_root, window_of
from trainer.data.samples import Window, cut

log = structlog.get_logger()

VERSIONS_PER_READ = 8
"""Commits read at once: bounds memory while a trainer catches up."""

Key = tuple[str, int, int, int]
"""Topic, partition, offset and number of the piece: names a window for good."""
Record = tuple[str, int, int]
Source = tuple[str, int]


class Tables(Protocol):
    """The reading half of the Delta log."""

    def version(self, name: str) -> int:
        """Newest version of a table."""

    def read_added(
        self, name: str, after_version: int, up_to_version: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows appended by the versions after one and up to another.

        Raises:
            GoneError: some of them can no longer be read.
        """

    def oldest_readable(self, name: str) -> int:
        """The version after which all rows that were appended can be read."""


@dataclass(slots=True)
class Entry:
    """A window, and what a choice between windows goes by."""

    key: Key
    window: Window
    label: str | None
    version: int
    """Number of the version that drafted it."""
    after: tuple[int, int]
    """Versions of ``accepted`` and ``rejected`` behind which all its rows lie."""
    passes: int = 0


class Reader:
    """A cursor over both tables that gives the windows of one line and target."""

    def __init__(self, tables: Tables, target: str, line: str, longest: int, counts: Counter[str]) -> None:
        """Stand before the first version.

        Args:
            tables: Where the rows are.
            target: Fingerprint that they must have.
            line: Line that they must have; others are counted.
            longest: Tokens to which windows are cut.
            counts: Rows and branches by what became of them.
        """
        self._tables = tables
        self._ours = {"target": target, "line": line}
        self._longest = longest
        self._counts = counts
        self._waiting: list[tuple[int, Row]] = []
        """Rejected rows whose windows are still to come, each with a version that it lies behind."""
        self.reached: dict[Source, int] = {}
        """Highest offset of each partition whose window was read."""
        self.cursor = 0
        self.rejected_cursor = 0
        self.newest_version = 0
        """Of those that windows were drafted by."""

    @property
    def waiting(self) -> int:
        """Rejected rows that are kept for windows to come."""
        return len(self._waiting)

    @property
    def waiting_after(self) -> int:
        """Version of ``rejected`` behind which everything lies that has no window yet."""
        return min([self.rejected_cursor, *(after for after, _ in self._waiting)])

    def stand(self, cursor: int, rejected_cursor: int, reached: Iterable[Record]) -> None:
        """Stand somewhere else, with nothing kept."""
        self.cursor, self.rejected_cursor, self._waiting = cursor, rejected_cursor, []
        self.reached = {(topic, partition): offset for topic, partition, offset in reached}

    def read(self, up_to: int, rejected_up_to: int, *, all_rejected: bool = False) -> list[Entry]:
        """Windows of the accepted rows after the cursor that are still there; moves both cursors.

        Args:
            up_to: Version of ``accepted`` to read to.
            rejected_up_to: Version of ``rejected`` behind which nothing is read.
            all_rejected: Read to just there, and not as far as the windows need it.

        Raises:
            TableError: the tables cannot be read; the cursors stay.
        """
        try:
            return list(self._read(up_to, rejected_up_to, all_rejected=all_rejected))
        except HistoryExpiredError as error:
            log.warning("versions_gone", why=str(error))
        oldest, oldest_rejected = self._tables.oldest_readable("accepted"), self._tables.oldest_readable("rejected")
        self._counts["versions_gone"] += max(0, oldest - self.cursor)
        self.cursor, self.rejected_cursor = max(self.cursor, oldest), max(self.rejected_cursor, oldest_rejected)
        up_to, rejected_up_to = max(up_to, self.cursor), max(rejected_up_to, self.rejected_cursor)
        return list(self._read(up_to, rejected_up_to, all_rejected=all_rejected))

    def _read(self, up_to: int, rejected_up_to: int, *, all_rejected: bool) -> Iterator[Entry]:
        accepted = self._tables.read_added("accepted", self.cursor, up_to, ACCEPTED_COLUMNS).to_pylist()
        # Within a commit the tables keep no order.
        accepted.sort(key=lambda row: (row["time"], record_of(row)))
        wanted = _last_offsets(row for row in accepted if self._is_ours(row))
        rejected, read_up_to = list(self._waiting), self.rejected_cursor
        seen = _last_offsets(row for _, row in rejected)
        while read_up_to < rejected_up_to and (all_rejected or not _covers(seen, wanted)):
            begin, read_up_to = read_up_to, min(read_up_to + VERSIONS_PER_READ, rejected_up_to)
            added = self._tables.read_added("rejected", begin, read_up_to, REJECTED_COLUMNS).to_pylist()
            added.sort(key=lambda row: (record_of(row), row["root_position"], row["branch"]))
            seen = _higher(seen, _last_offsets(added))
            rejected += [(begin, row) for row in added if self._is_ours(row)]
        after = self.cursor, self.waiting_after
        self.cursor, self.rejected_cursor = up_to, read_up_to
        return self._entries(accepted, self._claim(accepted, rejected), after)

    def _claim(self, accepted: Iterable[Row], rejected: Iterable[tuple[int, Row]]) -> dict[Record, list[Row]]:
        """Rejected rows by record; those of records that are still to come wait."""
        self.reached = _higher(self.reached, _last_offsets(accepted))
        claimed: dict[Record, list[Row]] = {}
        self._waiting = []
        for after, row in rejected:
            topic, partition, offset = record = record_of(row)
            if offset > self.reached.get((topic, partition), -1):
                self._waiting.append((after, row))
            else:
                claimed.setdefault(record, []).append(row)
        return claimed

    def _entries(
        self, accepted: Iterable[Row], branches: dict[Record, list[Row]], after: tuple[int, int]
    ) -> Iterator[Entry]:
        for row in accepted:
            if not self._is_ours(row):
                self._counts["foreign_windows"] += 1
                continue
            self._counts["windows"] += 1
            version = version_number(row["speculator"])
            self.newest_version = max(self.newest_version, version)
            if not has_beginning(row):
                self._counts["windows_without_beginning"] += 1
                continue
            rooted = [r for r in branches.get(record_of(row), []) if self._has_root(r, row)]
            pieces = cut(window_of(row, rooted), self._longest)
            self._counts["pieces"] += len(pieces)
            self._counts["branches"] += sum(len(piece.branches) for piece in pieces)
            for i, piece in enumerate(pieces):
                yield Entry((*record_of(row), i), piece, row["label"], version, after)

    def _is_ours(self, row: Row) -> bool:
        return all(row[column] == value for column, value in self._ours.items())

    def _has_root(self, rejected: Row, accepted: Row) -> bool:
        if has_root(rejected, accepted):
            return True
        self._counts["branches_without_root"] += 1
        return False


def record_of(row: Row) -> Record:
    """The Kafka record that a row came from."""
    return row["topic"], row["partition"], row["offset"]


def _last_offsets(rows: Iterable[Row]) -> dict[Source, int]:
    """The highest offset of each partition."""
    last: dict[Source, int] = {}
    for topic, partition, offset in map(record_of, rows):
        last[topic, partition] = max(last.get((topic, partition), -1), offset)
    return last


def _higher(a: Mapping[Source, int], b: Mapping[Source, int]) -> dict[Source, int]:
    return {source: max(a.get(source, -1), b.get(source, -1)) for source in [*a, *(s for s in b if s not in a)]}


def _covers(seen: Mapping[Source, int], wanted: Mapping[Source, int]) -> bool:
    return all(seen.get(source, -1) >= offset for source, offset in wanted.items())
