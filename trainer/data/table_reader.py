"""Read the tables ``accepted`` and ``rejected`` version by version; join branches to chunks, and chunks to requests.

A branch is joined to its sample by the Kafka record that both come from. ``rejected`` is committed before
``accepted``, the rows of a record are in one commit, and commits keep the order of offsets in each partition.
Therefore ``rejected`` is read until the record of every sample is passed, or to its newest version; rows of records
whose samples are not read yet are kept for the next read.

The chunks of a request are joined here and not in the stream: a row of the stream depends on one Kafka record, so that
redelivery rebuilds it; and what a reader has joined follows from its cursor and from the records that it still holds,
which a checkpoint names. A request is returned when its last chunk is read, and without it when a chunk between is
missing, when no chunk arrived for ``train.join_timeout``, or when open requests exceed ``train.join_bytes``. Chunks
that arrive later form another sample.

Maintenance deletes versions that no reader has needed for a long time. A reader that is too late skips deleted
versions and counts them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import structlog

from pipeline.delta import DeltaLog, HistoryExpiredError
from schemas.settings import Train
from trainer.data.replay_buffer import ReplayEntry, version_number
from trainer.data.samples import (
    ACCEPTED_COLUMNS,
    REJECTED_COLUMNS,
    Row,
    Sample,
    continues,
    drop_rootless_branches,
    join_samples,
    provides_features,
    read_sample,
    split_sample,
)

log = structlog.get_logger()

DROPPED_BRANCHES = {
    "no_features": "branches_without_features",
    "no_sample": "branches_without_sample",
    "no_root": "branches_without_root",
    "no_teacher": "branches_without_teacher",
    "improbable": "branches_improbable",
}
"""Why a branch is not trained on, with the name of its count. The chunk of the branch has no features, or its accepted
row is missing; the sample lacks the root or the token before it, or nothing near it is learned from; or its first
rejected token is less probable than ``train.rejected_min_prob``."""
VERSIONS_PER_READ = 8
"""Commits per read; bounds memory while a trainer catches up."""

ChunksKey = tuple[str, int, int, int]
"""Topic, partition, and first and last offset of chunks of one request that are joined."""
SampleKey = tuple[str, int, int, int, int]
"""The chunks of a sample and its number among their samples: identifies a sample forever."""
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


@dataclass(slots=True, eq=False)
class OpenRequest:
    """Consecutive chunks of a request, which are returned together."""

    request: str
    topic: str
    partition: int
    offsets: list[int] = field(default_factory=list)
    chunks: list[Sample] = field(default_factory=list)
    drafted_by: int = 0
    after: list[tuple[int, int]] = field(default_factory=list)
    """Versions of both tables after which the rows of each chunk were committed."""
    size: int = 0
    """Bytes of the features."""
    read_at: float = 0.0
    """Time at which the newest chunk was read, on the reader's clock."""

    @property
    def key(self) -> ChunksKey:
        """Where the chunks come from."""
        return self.topic, self.partition, self.offsets[0], self.offsets[-1]

    @property
    def first_after(self) -> tuple[int, int]:
        """Versions of both tables after which all rows were committed."""
        return min(a for a, _ in self.after), min(r for _, r in self.after)

    def continues_with(self, chunk: Sample) -> bool:
        """Return whether no token between the chunks and the next one is missing."""
        return continues(self.chunks, chunk)

    def add(self, row: Row, chunk: Sample, after: tuple[int, int], now: float) -> None:
        """Append the next chunk."""
        self.offsets.append(row["offset"])
        self.chunks.append(chunk)
        self.after.append(after)
        self.drafted_by = max(self.drafted_by, version_number(row["speculator"]))
        self.size += len(row["features"])
        self.read_at = now


class TableReader:
    """A cursor over both tables that returns the samples of one line and target."""

    def __init__(
        self,
        tables: DeltaLog,
        target: str,
        line: str,
        settings: Train,
        counts: Counter[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start before the first version.

        Args:
            tables: The tables to read.
            target: Target fingerprint of the rows to read.
            line: Speculator line of the rows to read; rows of other targets are counted.
            settings: Bounds of samples and of open requests.
            counts: Counts rows and branches by kind.
            clock: Measures how long no chunk of a request arrived, in seconds.
        """
        self._tables = tables
        self._identity = {"target": target, "line": line}
        self._settings = settings
        self._counts = counts
        self._clock = clock
        self._open: dict[str, OpenRequest] = {}
        """Requests without their last chunk, the one with the oldest chunk first."""
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

    @property
    def open_requests(self) -> tuple[tuple[ChunksKey, tuple[int, int]], ...]:
        """The chunks of requests that are not returned yet, with the versions after which they were committed."""
        return tuple((one.key, one.first_after) for one in self._open.values())

    def seek(self, cursor: int, rejected_cursor: int, reached: Iterable[RecordKey]) -> None:
        """Move both cursors and forget pending rows and open requests."""
        self.cursor, self.rejected_cursor, self._pending = cursor, rejected_cursor, []
        self._open.clear()
        self.reached = {(topic, partition): offset for topic, partition, offset in reached}

    def read(self, up_to: int, rejected_up_to: int) -> list[TableEntry]:
        """Return the samples of requests that are completed after the cursor, and move both cursors.

        Args:
            up_to: Version of ``accepted`` to read to.
            rejected_up_to: Newest version of ``rejected`` to read.

        Raises:
            TableError: the tables cannot be read; the cursors do not move.
        """
        rows = self._read_existing(up_to, rejected_up_to, all_rejected=False)
        return [entry for request in self._join_chunks(rows) for entry in self._cut(request)]

    def take_overdue(self) -> list[TableEntry]:
        """Return the samples of open requests that are too old, or too large together."""
        total, now = sum(one.size for one in self._open.values()), self._clock()
        overdue: list[OpenRequest] = []
        for one in list(self._open.values()):
            if total > self._settings.join_bytes or now - one.read_at >= self._settings.join_timeout:
                overdue.append(self._open.pop(one.request))
                total -= one.size
        self._counts["requests_joined_early"] += len(overdue)
        return [entry for one in overdue for entry in self._cut(one)]

    def take_open(self) -> list[TableEntry]:
        """Return the samples of all open requests, at the end of a span of versions."""
        requests, self._open = list(self._open.values()), {}
        return [entry for one in requests for entry in self._cut(one)]

    def reread(
        self, up_to: int, rejected_up_to: int, returned: Iterable[ChunksKey], open_requests: Iterable[ChunksKey]
    ) -> Iterator[TableEntry]:
        """Read exactly to both versions, a few versions at a time, and join the chunks that were joined before.

        Yields:
            The samples of the chunks to return, in no order; chunks that were deleted since are left out.

        Args:
            up_to: Version of ``accepted`` to read to.
            rejected_up_to: Version of ``rejected`` to read to.
            returned: Chunks to return.
            open_requests: Chunks that are joined with later ones.

        Raises:
            TableError: the tables cannot be read; ``seek`` before another attempt.
        """
        still_open = list(open_requests)
        by_first = {key[:3]: key for key in (*returned, *still_open)}
        joining: dict[tuple[PartitionKey, str], tuple[ChunksKey, OpenRequest]] = {}
        reopened: dict[ChunksKey, OpenRequest] = {}
        # Branches wait until the records of their samples are read again.
        reached, self.reached = self.reached, {}
        while self.cursor < up_to:
            read_to = min(self.cursor + VERSIONS_PER_READ, up_to)
            for one in sorted(
                self._read_existing(read_to, rejected_up_to, all_rejected=True), key=lambda one: _record_key(one.row)
            ):
                topic, partition, offset = record = _record_key(one.row)
                name = (topic, partition), one.row["request"]
                if record in by_first:
                    joining[name] = by_first[record], OpenRequest(one.row["request"], topic, partition)
                if name not in joining:
                    continue
                key, request = joining[name]
                if request.chunks and not request.continues_with(one.sample):
                    del joining[name]
                    continue
                request.add(one.row, one.sample, one.after, self._clock())
                if offset < key[3]:
                    continue
                del joining[name]
                if key in still_open:
                    reopened[key] = request
                else:
                    yield from self._cut(request)
        self._open = {reopened[key].request: reopened[key] for key in still_open if key in reopened}
        self.reached = _merge_offsets(self.reached, reached)
        self._pending = [(after, row) for after, row in self._pending if not self._has_reached(row)]

    def _read_existing(self, up_to: int, rejected_up_to: int, *, all_rejected: bool) -> list[_ChunkRow]:
        """Return the usable rows after the cursor that still exist, and move both cursors."""
        try:
            return list(self._read(up_to, rejected_up_to, all_rejected=all_rejected))
        except HistoryExpiredError as error:
            log.warning("versions_deleted", error=str(error))
        oldest, oldest_rejected = self._tables.oldest_readable("accepted"), self._tables.oldest_readable("rejected")
        self._counts["versions_deleted"] += max(0, oldest - self.cursor)
        self.cursor, self.rejected_cursor = max(self.cursor, oldest), max(self.rejected_cursor, oldest_rejected)
        up_to, rejected_up_to = max(up_to, self.cursor), max(rejected_up_to, self.rejected_cursor)
        return list(self._read(up_to, rejected_up_to, all_rejected=all_rejected))

    def _read(self, up_to: int, rejected_up_to: int, *, all_rejected: bool) -> Iterator[_ChunkRow]:
        line = self._identity["line"]
        accepted = self._tables.read_added("accepted", self.cursor, up_to, ACCEPTED_COLUMNS, line).to_pylist()
        # Within a commit the tables keep no order.
        accepted.sort(key=lambda row: (row["time"], _record_key(row)))
        needed = _last_offsets(row for row in accepted if self._is_ours(row))
        rejected, read_up_to = list(self._pending), self.rejected_cursor
        seen = _last_offsets(row for _, row in rejected)
        while read_up_to < rejected_up_to and (all_rejected or not _covers(seen, needed)):
            begin, read_up_to = read_up_to, min(read_up_to + VERSIONS_PER_READ, rejected_up_to)
            added = self._tables.read_added("rejected", begin, read_up_to, REJECTED_COLUMNS, line).to_pylist()
            added.sort(key=lambda row: (_record_key(row), row["root_position"], row["branch"]))
            seen = _merge_offsets(seen, _last_offsets(added))
            rejected += [(begin, row) for row in added if self._is_ours(row)]
        after = self.cursor, self.pending_after
        self.cursor, self.rejected_cursor = up_to, read_up_to
        branches = self._take_rejected(accepted, rejected)
        if not all_rejected:
            found = {_record_key(row) for row in accepted}
            alone = [row for record in branches.keys() - found for row in branches[record]]
            self._counts["branches_without_sample"] += len(alone)
        return self._parse_rows(accepted, branches, after)

    def _take_rejected(
        self, accepted: Iterable[Row], rejected: Iterable[tuple[int, Row]]
    ) -> dict[RecordKey, list[Row]]:
        """Return rejected rows by record; keep the rows of records that are not read yet."""
        self.reached = _merge_offsets(self.reached, _last_offsets(accepted))
        taken: dict[RecordKey, list[Row]] = {}
        self._pending = []
        for after, row in rejected:
            if self._has_reached(row):
                taken.setdefault(_record_key(row), []).append(row)
            else:
                self._pending.append((after, row))
        return taken

    def _has_reached(self, rejected: Row) -> bool:
        topic, partition, offset = _record_key(rejected)
        return offset <= self.reached.get((topic, partition), -1)

    def _parse_rows(
        self, accepted: Iterable[Row], branches: dict[RecordKey, list[Row]], after: tuple[int, int]
    ) -> Iterator[_ChunkRow]:
        for row in accepted:
            if not self._is_ours(row):
                self._counts["foreign_rows"] += 1
                continue
            self._counts["rows"] += 1
            self.newest_drafted_by = max(self.newest_drafted_by, version_number(row["speculator"]))
            of_row = branches.get(_record_key(row), [])
            if not provides_features(row):
                self._counts["rows_without_features"] += 1
                self._counts["branches_without_features"] += len(of_row)
                continue
            yield _ChunkRow(row, read_sample(row, of_row), after)

    def _join_chunks(self, rows: Iterable[_ChunkRow]) -> Iterator[OpenRequest]:
        """Yield the requests that end with these rows, and those whose next chunk is missing."""
        for one in rows:
            row, chunk = one.row, one.sample
            request = self._open.pop(row["request"], None)
            if request and (
                (row["topic"], row["partition"]) != (request.topic, request.partition)
                or not request.continues_with(chunk)
            ):
                self._counts["requests_joined_early"] += 1
                yield request
                request = None
            request = request or OpenRequest(row["request"], row["topic"], row["partition"])
            request.add(row, chunk, one.after, self._clock())
            if row["last_chunk"] is False:
                self._open[row["request"]] = request
            else:
                yield request

    def _cut(self, request: OpenRequest) -> Iterator[TableEntry]:
        """Return the samples of joined chunks."""
        whole = join_samples(request.chunks)
        rooted = drop_rootless_branches(whole)
        self._counts["branches_without_root"] += len(whole.branches) - len(rooted.branches)
        samples = split_sample(rooted, self._settings.max_sample_tokens, self._settings.context_tokens)
        self._counts["samples"] += len(samples)
        kept = [branch for sample in samples for branch in sample.branches]
        self._counts["branches"] += len(kept)
        self._counts["branches_without_teacher"] += len(rooted.branches) - len(kept)
        self._counts["branches_improbable"] += sum(b.rejected_prob < self._settings.rejected_min_prob for b in kept)
        for i, sample in enumerate(samples):
            key = *request.key, i
            yield TableEntry(sample=sample, key=key, drafted_by=request.drafted_by, after=request.first_after)

    def _is_ours(self, row: Row) -> bool:
        return all(row[column] == value for column, value in self._identity.items())


@dataclass(frozen=True, slots=True, eq=False)
class _ChunkRow:
    """A row of ``accepted`` with its branches."""

    row: Row
    sample: Sample
    after: tuple[int, int]
    """Versions of both tables after which its rows were committed."""


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
