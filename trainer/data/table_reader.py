"""Read the tables ``accepted`` and ``rejected`` version by version, and join branches to their samples.

A branch is joined to its sample by the Kafka record that both come from. ``rejected`` is committed before
``accepted``, the rows of a record are in one commit, and commits keep the order of offsets in each partition.
Therefore ``rejected`` is read until the record of every sample is passed, or to its newest version; rows of records
whose samples are not read yet are kept for the next read.

Maintenance deletes versions that no reader has needed for a long time. A reader that is too late skips deleted
versions and counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import structlog

from pipeline.delta import DeltaLog, HistoryExpiredError
from trainer.data.replay_buffer import ReplayEntry, version_number
from trainer.data.samples import (
    ACCEPTED_COLUMNS,
    REJECTED_COLUMNS,
    Row,
    has_root,
    provides_features,
    read_sample,
    split_sample,
)

log = structlog.get_logger()

VERSIONS_PER_READ = 8
"""Commits per read; bounds memory while a trainer catches up."""

SampleKey = tuple[str, int, int, int]
"""Topic, partition, offset and number within the row: identifies a sample forever."""
RecordKey = tuple[str, int, int]
"""Topic, partition and offset."""
PartitionKey = tuple[str, int]
"""Topic and partition."""


@dataclass(slots=True, kw_only=True)
class TableEntry(ReplayEntry):
    """A sample, and where in the tables it comes from."""

    key: SampleKey
    drafted_by: int
    """Number of the speculator version that drafted it."""
    after: tuple[int, int]
    """Versions of ``accepted`` and ``rejected`` after which all its rows were committed."""


class TableReader:
    """A cursor over both tables that returns the samples of one line and target."""

    def __init__(self, tables: DeltaLog, target: str, line: str, max_tokens: int, counts: Counter[str]) -> None:
        """Start before the first version.

        Args:
            tables: The tables to read.
            target: Target fingerprint of the rows to read.
            line: Speculator line of the rows to read; rows of other lines or targets are counted.
            max_tokens: Length to which samples are split.
            counts: Counts rows and branches by kind.
        """
        self._tables = tables
        self._identity = {"target": target, "line": line}
        self._max_tokens = max_tokens
        self._counts = counts
        self._pending: list[tuple[int, Row]] = []
        """Rejected rows whose samples are not read yet, each with a version after which it was committed."""
        self.reached: dict[PartitionKey, int] = {}
        """Highest offset of each partition whose sample was read."""
        self.cursor = 0
        self.rejected_cursor = 0
        self.newest_drafted_by = 0
        """Newest speculator version among the samples read."""

    @property
    def pending(self) -> int:
        """Number of rejected rows whose samples are not read yet."""
        return len(self._pending)

    @property
    def pending_after(self) -> int:
        """Version of ``rejected`` after which all rows without a sample were committed."""
        return min([self.rejected_cursor, *(after for after, _ in self._pending)])

    def seek(self, cursor: int, rejected_cursor: int, reached: Iterable[RecordKey]) -> None:
        """Move both cursors and forget pending rows."""
        self.cursor, self.rejected_cursor, self._pending = cursor, rejected_cursor, []
        self.reached = {(topic, partition): offset for topic, partition, offset in reached}

    def read(self, up_to: int, rejected_up_to: int, *, all_rejected: bool = False) -> list[TableEntry]:
        """Return the samples after the cursor that still exist, and move both cursors.

        Args:
            up_to: Version of ``accepted`` to read to.
            rejected_up_to: Newest version of ``rejected`` to read.
            all_rejected: Read exactly to ``rejected_up_to``, not only as far as the samples need it.

        Raises:
            TableError: the tables cannot be read; the cursors do not move.
        """
        try:
            return list(self._read(up_to, rejected_up_to, all_rejected=all_rejected))
        except HistoryExpiredError as error:
            log.warning("versions_deleted", error=str(error))
        oldest, oldest_rejected = self._tables.oldest_readable("accepted"), self._tables.oldest_readable("rejected")
        self._counts["versions_deleted"] += max(0, oldest - self.cursor)
        self.cursor, self.rejected_cursor = max(self.cursor, oldest), max(self.rejected_cursor, oldest_rejected)
        up_to, rejected_up_to = max(up_to, self.cursor), max(rejected_up_to, self.rejected_cursor)
        return list(self._read(up_to, rejected_up_to, all_rejected=all_rejected))

    def _read(self, up_to: int, rejected_up_to: int, *, all_rejected: bool) -> Iterator[TableEntry]:
        accepted = self._tables.read_added("accepted", self.cursor, up_to, ACCEPTED_COLUMNS).to_pylist()
        # Within a commit the tables keep no order.
        accepted.sort(key=lambda row: (row["time"], _record_key(row)))
        needed = _last_offsets(row for row in accepted if self._is_ours(row))
        rejected, read_up_to = list(self._pending), self.rejected_cursor
        seen = _last_offsets(row for _, row in rejected)
        while read_up_to < rejected_up_to and (all_rejected or not _covers(seen, needed)):
            begin, read_up_to = read_up_to, min(read_up_to + VERSIONS_PER_READ, rejected_up_to)
            added = self._tables.read_added("rejected", begin, read_up_to, REJECTED_COLUMNS).to_pylist()
            added.sort(key=lambda row: (_record_key(row), row["root_position"], row["branch"]))
            seen = _merge_offsets(seen, _last_offsets(added))
            rejected += [(begin, row) for row in added if self._is_ours(row)]
        after = self.cursor, self.pending_after
        self.cursor, self.rejected_cursor = up_to, read_up_to
        return self._join(accepted, self._take_rejected(accepted, rejected), after)

    def _take_rejected(
        self, accepted: Iterable[Row], rejected: Iterable[tuple[int, Row]]
    ) -> dict[RecordKey, list[Row]]:
        """Return rejected rows by record; keep the rows of records that are not read yet."""
        self.reached = _merge_offsets(self.reached, _last_offsets(accepted))
        taken: dict[RecordKey, list[Row]] = {}
        self._pending = []
        for after, row in rejected:
            topic, partition, offset = record = _record_key(row)
            if offset > self.reached.get((topic, partition), -1):
                self._pending.append((after, row))
            else:
                taken.setdefault(record, []).append(row)
        return taken

    def _join(
        self, accepted: Iterable[Row], branches: dict[RecordKey, list[Row]], after: tuple[int, int]
    ) -> Iterator[TableEntry]:
        for row in accepted:
            if not self._is_ours(row):
                self._counts["foreign_rows"] += 1
                continue
            self._counts["rows"] += 1
            drafted_by = version_number(row["speculator"])
            self.newest_drafted_by = max(self.newest_drafted_by, drafted_by)
            if not provides_features(row):
                self._counts["rows_without_features"] += 1
                continue
            rooted = [r for r in branches.get(_record_key(row), []) if self._has_root(r, row)]
            samples = split_sample(read_sample(row, rooted), self._max_tokens)
            self._counts["samples"] += len(samples)
            self._counts["branches"] += sum(len(sample.branches) for sample in samples)
            for i, sample in enumerate(samples):
                yield TableEntry(sample=sample, key=(*_record_key(row), i), drafted_by=drafted_by, after=after)

    def _is_ours(self, row: Row) -> bool:
        return all(row[column] == value for column, value in self._identity.items())

    def _has_root(self, rejected: Row, accepted: Row) -> bool:
        if has_root(rejected, accepted):
            return True
        self._counts["branches_without_root"] += 1
        return False


def _record_key(row: Row) -> RecordKey:
    return row["topic"], row["partition"], row["offset"]


def _last_offsets(rows: Iterable[Row]) -> dict[PartitionKey, int]:
    """Return the highest offset of each partition."""
    last: dict[PartitionKey, int] = {}
    for topic, partition, offset in map(_record_key, rows):
        last[topic, partition] = max(last.get((topic, partition), -1), offset)
    return last


def _merge_offsets(a: Mapping[PartitionKey, int], b: Mapping[PartitionKey, int]) -> dict[PartitionKey, int]:
    return {source: max(a.get(source, -1), b.get(source, -1)) for source in [*a, *(s for s in b if s not in a)]}


def _covers(seen: Mapping[PartitionKey, int], needed: Mapping[PartitionKey, int]) -> bool:
    return all(seen.get(source, -1) >= offset for source, offset in needed.items())
