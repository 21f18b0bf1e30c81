"""Writes records to the tables: one thread selects, builds and commits, and retries while the tables fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import structlog

from pipeline.batches import BuiltBatch, Record, build, build_unread
from pipeline.crashes import MAX_CRASHES, CrashCounter
from pipeline.deduplication import Deduplicator
from pipeline.delta import DeltaLog, TableError
from pipeline.drift.monitor import DriftEventProducer, DriftMonitor
from pipeline.metrics import StreamCounters, StreamTimes
from pipeline.offsets import (
    COMMIT_ORDER,
    Batch,
    ConflictError,
    FencedError,
    OffsetCommitter,
    SourcePartition,
    find_lost_offsets,
    select_records,
)
from pipeline.topic_logs import LastRecord, read_last_record
from pipeline.validation import find_other_version
from schemas.claim_store import ClaimStore, ClaimStoreError
from schemas.settings import Settings
from schemas.telemetry import spans
from schemas.telemetry.spans import MAX_LINKS, Span
from schemas.telemetry.trace_context import (
    TRACEPARENT,
    TraceContext,
    new_trace,
    parse_traceparent,
    request_context,
)

log = structlog.get_logger()
T = TypeVar("T")

BACKOFF_S = (0.5, 15.0)
"""First and longest wait before a failed attempt is retried."""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """State of the partitions after a write."""

    next_offsets: Mapping[SourcePartition, int]
    gaps: tuple[SourcePartition, ...]
    """Partitions whose record at the next offset was not delivered, although later ones were."""
    paused: Mapping[SourcePartition, str]
    """Partitions whose record at the next offset has another major version of the trace format, with that version."""


class Writable(NamedTuple):
    """The records of a partition that can be written."""

    records: Sequence[Record]
    holes: tuple[range, ...]
    """Holes between them."""
    paused_by: str | None
    """The trace format of the record behind them, if it is another major version."""


def cut_at_other_version(records: Sequence[Record], holes: tuple[range, ...]) -> Writable:
    """Cut selected records before the first one with another major version of the trace format.

    It is no dead letter, because nothing is wrong with it: an upgraded worker reads it.
    """
    for number, record in enumerate(records):
        if other := find_other_version(record.header):
            return Writable(records[:number], tuple(hole for hole in holes if hole.stop < record.offset), other)
    return Writable(records, holes, None)


class TableWriter:
    """Runs one operation after the other on its thread. Use it on one event loop."""

    def __init__(self, settings: Settings, counters: StreamCounters, times: StreamTimes) -> None:
        self.error: str | None = None
        """Error of the last attempt; None once an attempt succeeds."""
        self._group_id = settings.stream.group_id
        self._counters, self._times = counters, times
        self._tables = tables = DeltaLog(settings.tables)
        self._committer = OffsetCommitter(tables, ThreadPoolExecutor(len(COMMIT_ORDER) - 1, "table"))
        self.drift = DriftMonitor(settings.drift, tables, DriftEventProducer(settings.kafka))
        self._deduplicator = Deduplicator(tables, settings.stream.duplicate_window)
        self._claims = ClaimStore(settings.traces)
        self._crashes = CrashCounter(tables, settings.stream.flush_records)
        self._context_tokens = settings.stream.context_tokens
        self._thread = ThreadPoolExecutor(1, "tables")
        self._attempt_started: float | None = None

    @property
    def attempt_s(self) -> float:
        """Duration of the current attempt to read or write the tables; 0 without one."""
        started = self._attempt_started
        return 0.0 if started is None else time.monotonic() - started

    async def write(
        self, records: Mapping[SourcePartition, Sequence[Record]], holes: Mapping[SourcePartition, Sequence[range]]
    ) -> WriteResult:
        """Write the selected ones of these records, and record the holes between them. Return when the tables do."""
        return await self._retry(lambda: self._write(records, holes))

    async def next_offset(self, source: SourcePartition) -> int:
        """Return the next offset of a partition, as the tables have it."""
        return await self._retry(lambda: self._read_next_offset(source))

    async def last_record(self, source: SourcePartition) -> LastRecord | None:
        """Return the last record that the tables have of a partition; None if they no longer have it."""
        return await self._retry(lambda: read_last_record(self._tables, source, self._committer.next_offset(source)))

    async def record_hole(self, source: SourcePartition, hole: range) -> int:
        """Record a hole at the next offset that no record follows yet. Return the next offset after it."""
        return await self._retry(lambda: self._record_hole(source, hole))

    async def record_loss(self, source: SourcePartition, log_start: int) -> int:
        """Record the offsets before ``log_start`` that the broker deleted unread. Return the next offset after them."""
        return await self._retry(lambda: self._record_loss(source, log_start))

    def reassign(self, sources: Iterable[SourcePartition]) -> None:
        """Drop cached state after an assignment: another worker may have written since.

        It runs on the thread, after a commit that is in progress.
        """
        assigned = list(sources)
        self._thread.submit(self._committer.invalidate, assigned)
        self._thread.submit(self.drift.retain, assigned)
        self._thread.submit(self._deduplicator.retain, assigned)

    def close(self) -> None:
        """Wait for the current operation to end, and for the drift events to be delivered."""
        self._thread.shutdown()
        self.drift.close()

    def _write(
        self, records: Mapping[SourcePartition, Sequence[Record]], holes: Mapping[SourcePartition, Sequence[range]]
    ) -> WriteResult:
        """Write the records together, or one by one where workers have ended."""
        gaps: set[SourcePartition] = set()
        paused: dict[SourcePartition, str] = {}
        for part in self._split(records):
            before = {source: self._committer.next_offset(source) for source in part}
            try:
                gaps |= self._write_part(part, holes, paused)
            except Exception:
                self._crashes.fail(part)
                raise
            self._crashes.pass_(source for source in part if self._committer.next_offset(source) > before[source])
        next_offsets = {source: self._committer.next_offset(source) for source in records}
        return WriteResult(next_offsets, tuple(sorted(gaps - paused.keys())), paused)

    def _split(
        self, records: Mapping[SourcePartition, Sequence[Record]]
    ) -> Iterator[Mapping[SourcePartition, Sequence[Record]]]:
        for source in records:
            self._crashes.begin(source, self._committer.next_offset(source))
        if together := {s: of_source for s, of_source in records.items() if not self._crashes.is_careful(s)}:
            yield together
        for source in records.keys() - together.keys():
            for record in records[source]:
                self._crashes.begin(source, self._committer.next_offset(source))
                yield {source: [record]}

    def _write_part(
        self,
        records: Mapping[SourcePartition, Sequence[Record]],
        holes: Mapping[SourcePartition, Sequence[range]],
        paused: dict[SourcePartition, str],
    ) -> set[SourcePartition]:
        """Select, build and commit. Return the partitions with a gap, and add those that pause to ``paused``."""
        starts = {source: self._committer.next_offset(source) for source in records}
        selections = {
            source: select_records(starts[source], [record.offset for record in delivered], holes[source])
            for source, delivered in records.items()
        }
        writable = {
            source: cut_at_other_version([records[source][i] for i in selection.selected], selection.holes)
            for source, selection in selections.items()
        }
        paused |= {source: cut.paused_by for source, cut in writable.items() if cut.paused_by}
        selected = {source: cut.records for source, cut in writable.items() if cut.records}
        started = time.time()
        built = {source: self._build(source, starts[source], of_source) for source, of_source in selected.items()}
        if built:
            committed = self._commit(
                [
                    Batch(source, selected[source][-1].offset, batch.rows, writable[source].holes, _now_us())
                    for source, batch in built.items()
                ]
            )
            ended = time.time()
            self._times.observe(ended - started, [ended - r.time_us / 1e6 for rs in selected.values() for r in rs])
            versions = {name: self._tables.snapshot_version(name) for name in committed}
            for span in _build_spans(selected, versions, self._group_id, started, ended):
                spans.record(span)
        for source, batch in built.items():
            self._count(selected[source], batch)
            offsets = range(starts[source], selected[source][-1].offset + 1)
            self._deduplicator.advance(source, offsets.stop, batch.written)
            self.drift.observe(source, offsets, batch.rows["traces"])
        self._counters.records_skipped += sum(selection.skipped for selection in selections.values())
        self._counters.records_deferred += sum(
            selection.deferred + len(selection.selected) - len(writable[source].records)
            for source, selection in selections.items()
        )
        return {source for source, selection in selections.items() if selection.has_gap}

    def _commit(self, batches: Sequence[Batch]) -> tuple[str, ...]:
        committed = self._committer.commit(batches)
        self._counters.commits += 1
        self._counters.last_commit_time = time.time()
        self._counters.hole_offsets += sum(len(hole) for batch in batches for hole in batch.holes)
        return committed

    def _read_next_offset(self, source: SourcePartition) -> int:
        self._committer.invalidate([source])
        return self._committer.next_offset(source)

    def _record_hole(self, source: SourcePartition, hole: range) -> int:
        if hole.start == self._committer.next_offset(source):
            rows = build((), self._context_tokens).rows
            self._commit([Batch(source, hole.stop - 1, rows, (hole,), _now_us())])
        return self._committer.next_offset(source)

    def _build(self, source: SourcePartition, next_offset: int, records: Sequence[Record]) -> BuiltBatch:
        window = self._deduplicator.window(source, next_offset)
        crashes = self._crashes.begin(source, next_offset)
        if crashes >= MAX_CRASHES:
            log.error("record_ends_workers", partition=source.partition, offset=records[0].offset, crashes=crashes)
            return build_unread(records[0], crashes)
        return build(records, self._context_tokens, self._claims.get, window)

    def _count(self, records: Sequence[Record], batch: BuiltBatch) -> None:
        self._counters.rows_written += batch.rows["traces"].num_rows
        self._counters.dead_letters.update(batch.dead_letters)
        self._counters.chunk_gaps += batch.chunk_gaps
        self._counters.consumed_bytes += sum(len(record.value or b"") for record in records)

    def _record_loss(self, source: SourcePartition, log_start: int) -> int:
        next_offset = self._committer.next_offset(source)
        lost = find_lost_offsets(source, next_offset, log_start, max(log_start, next_offset))
        if lost:
            self._committer.record_loss(source, lost, _now_us())
            self._counters.records_lost += len(lost)
            log.error("records_lost_to_retention", partition=source.partition, first=lost.start, records=len(lost))
        return self._committer.next_offset(source)

    async def _retry(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the thread until it succeeds. Consumption waits meanwhile."""
        wait, longest = BACKOFF_S
        while True:
            try:
                done = await asyncio.get_running_loop().run_in_executor(self._thread, self._attempt, work)
            except FencedError as error:
                self._counters.commits_fenced += 1
                log.warning("commit_fenced", why=str(error))
            except (TableError, ConflictError, ClaimStoreError) as error:
                self._counters.table_errors += 1
                self.error = str(error)
                log.warning("table_failed", why=str(error), retry_in_s=wait)
                await asyncio.sleep(wait)
                wait = min(wait * 2, longest)
            else:
                self.error = None
                return done

    def _attempt(self, work: Callable[[], T]) -> T:
        self._attempt_started = time.monotonic()
        try:
            return work()
        finally:
            self._attempt_started = None


def _now_us() -> int:
    return time.time_ns() // 1000


def _build_spans(
    records: Mapping[SourcePartition, Sequence[Record]],
    table_versions: Mapping[str, int],
    group_id: str,
    start: float,
    end: float,
) -> Iterator[Span]:
    """Yield the spans of a commit, linked to the spans that published its records. A span has at most ``MAX_LINKS``.

    Args:
        records: The committed records by partition, ordered by offset.
        table_versions: By table that was committed, the version that the commit made.
        group_id: The consumer group.
        start: Unix time at which building the rows began.
        end: Unix time at which the last table was committed.
    """
    context = new_trace()
    for source, of_source in records.items():
        for first in range(0, len(of_source), MAX_LINKS):
            run = of_source[first : first + MAX_LINKS]
            yield Span(
                name=f"process {source.broker_topic}",
                event="batch_committed",
                context=context.child(),
                start=start,
                end=end,
                kind="consumer",
                links=tuple(dict.fromkeys(map(_sender_context, run))),
                attributes={
                    "messaging.system": "kafka",
                    "messaging.operation.name": "process",
                    "messaging.operation.type": "process",
                    "messaging.destination.name": source.broker_topic,
                    "messaging.destination.partition.id": str(source.partition),
                    "messaging.consumer.group.name": group_id,
                    "messaging.batch.message_count": len(run),
                    "first_offset": run[0].offset,
                    "last_offset": run[-1].offset,
                    **{f"version_of_{name}": version for name, version in table_versions.items()},
                },
            )


def _sender_context(record: Record) -> TraceContext:
    """Return the context in the record's header; without one, a context derived from the request id in its key."""
    header = next((value for name, value in record.headers if name == TRACEPARENT), None)
    return parse_traceparent(header) or request_context((record.key or b"").decode(errors="replace"))
