"""The tables' side of a stream worker: one thread that decides, builds and commits, and tries again while they fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import structlog

from pipeline.batches import Built, Record, build
from pipeline.commit_spans import commit_spans
from pipeline.deduplication import Duplicates
from pipeline.delta import DeltaLog, TableError
from pipeline.drift.monitor import DriftWatch
from pipeline.drift.topic import DriftTopic
from pipeline.metrics import Counts
from pipeline.offsets import COMMIT_ORDER, Batch, ConflictError, FencedError, Intake, Source, admit, lost_range
from schemas.claim_store import ClaimStore, ClaimStoreError
from schemas.settings import Settings
from schemas.telemetry import spans

log = structlog.get_logger()
T = TypeVar("T")

BACKOFF_S = (0.5, 15.0)
"""First and longest wait before a failed commit is tried again."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of delivered records."""

    wanted: Mapping[Source, int]
    gaps: tuple[Source, ...]
    """Partitions of which later records came than the wanted one."""


class Writer:
    """Writes what its caller awaits, one thing after the other. To be used on one event loop."""

    def __init__(self, settings: Settings, counts: Counts) -> None:
        self.error: str | None = None
        """Why the tables did not take what they were given last; None once they did."""
        self.committed_at: float | None = None
        """Unix time of the last commit."""
        self._group_id = settings.stream.group_id
        self._counts = counts
        self._tables = tables = DeltaLog(settings.tables)
        self._intake = Intake(tables, ThreadPoolExecutor(len(COMMIT_ORDER) - 1, "table"))
        self.drift = DriftWatch(settings.drift, tables, DriftTopic(settings.kafka))
        self._duplicates = Duplicates(tables, settings.stream.duplicate_window)
        self._claims = ClaimStore(settings.traces)
        self._context = settings.stream.context_tokens
        self._thread = ThreadPoolExecutor(1, "tables")
        self._since: float | None = None

    @property
    def busy_s(self) -> float:
        """For how long the attempt on the tables that runs has lasted; 0 where none does."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    async def store(self, records: Mapping[Source, Sequence[Record]]) -> Stored:
        """Return when the tables hold what they take of these records."""
        return await self._persistently(lambda: self._store(records))

    async def wanted(self, source: Source) -> int:
        """Next offset that the tables want of a partition."""
        return await self._persistently(lambda: self._intake.wanted(source))

    async def settle(self, source: Source, start: int) -> int:
        """Write down what the broker has deleted before it was read; the wanted offset afterwards.

        Args:
            source: The partition.
            start: Offset of the oldest record that the broker has.
        """
        return await self._persistently(lambda: self._settle(source, start))

    def forget(self, sources: Iterable[Source]) -> None:
        """Another worker may have written since: ask the tables again where they stand.

        Behind a commit that is still running: it ends before its thread forgets.
        """
        owned = list(sources)
        self._thread.submit(self._intake.forget, owned)
        self._thread.submit(self.drift.keep, owned)
        self._thread.submit(self._duplicates.keep, owned)

    def _store(self, records: Mapping[Source, Sequence[Record]]) -> Stored:
        """Decide, build and commit."""
        admitted = {
            source: admit(self._intake.wanted(source), [record.offset for record in arrived])
            for source, arrived in records.items()
        }
        taken = {source: [records[source][i] for i in plan.taken] for source, plan in admitted.items() if plan.taken}
        start = time.time()
        built = {source: self._build(source, of_one) for source, of_one in taken.items()}
        if built:
            self._intake.commit([Batch(source, taken[source][-1].offset, built[source].rows) for source in built])
            self._counts.commits += 1
            self.committed_at = time.time()
            self._tell(taken, start)
        for source, made in built.items():
            self._count(taken[source], made)
            first, last = taken[source][0].offset, taken[source][-1].offset
            self._duplicates.committed(source, last + 1, made.taken)
            self.drift.observe(source, range(first, last + 1), made.rows["traces"])
        self._counts.skipped_behind += sum(plan.behind for plan in admitted.values())
        self._counts.left_out += sum(plan.ahead for plan in admitted.values())
        wanted = {source: self._intake.wanted(source) for source in records}
        return Stored(wanted, tuple(source for source, plan in admitted.items() if plan.gap))

    def _build(self, source: Source, records: Sequence[Record]) -> Built:
        known = self._duplicates.known(source, records[0].offset)
        return build(records, self._context, self._claims.get, known)

    def _tell(self, taken: Mapping[Source, Sequence[Record]], start: float) -> None:
        versions = {name: self._tables.snapshot_version(name) for name in COMMIT_ORDER}
        for span in commit_spans(taken, versions, self._group_id, start, time.time()):
            spans.record(span)

    def _count(self, taken: Sequence[Record], built: Built) -> None:
        self._counts.rows_written += built.rows["traces"].num_rows
        self._counts.dead_letters.update(built.dead)
        self._counts.gaps += built.gaps
        self._counts.bytes_taken += sum(len(record.value or b"") for record in taken)

    def _settle(self, source: Source, start: int) -> int:
        wanted = self._intake.wanted(source)
        lost = lost_range(source, wanted, start, max(start, wanted))
        if lost:
            self._intake.record_loss(source, lost, time.time_ns() // 1000)
            self._counts.lost += len(lost)
            log.error("records_lost_to_retention", partition=source.partition, first=lost.start, records=len(lost))
        return self._intake.wanted(source)

    async def _persistently(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the thread until it succeeds: while it fails, consumption waits."""
        wait, longest = BACKOFF_S
        while True:
            try:
                done = await asyncio.get_running_loop().run_in_executor(self._thread, self._timed, work)
            except FencedError as error:
                self._counts.fenced += 1
                log.warning("commit_fenced", why=str(error))
            except (TableError, ConflictError, ClaimStoreError) as error:
                self._counts.table_errors += 1
                self.error = str(error)
                log.warning("table_failed", why=str(error), retry_in_s=wait)
                await asyncio.sleep(wait)
                wait = min(wait * 2, longest)
            else:
                self.error = None
                return done

    def _timed(self, work: Callable[[], T]) -> T:
        self._since = time.monotonic()
        try:
            return work()
        finally:
            self._since = None
