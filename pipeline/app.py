"""The stream worker: a Faust app that brings trace records from Kafka into the tables. Wiring only.

Faust delivers, and nothing more is asked of it: ``offsets`` decides what is taken, ``batches`` what becomes of it, and
``table`` writes it. Faust is known to skip records and to fall silent; a gap is seen by its offsets, and a worker that
stands still while records wait ends itself, so that its supervisor starts it again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import faust
import structlog
from faust.types import TP, AppT, EventT, StreamT
from faust.web import Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from pipeline import topics
from pipeline.batches import Built, Record, build
from pipeline.counts import Counts, exposition
from pipeline.credentials import credentials, ignored
from pipeline.offsets import (
    Batch,
    ConflictError,
    FencedError,
    ForeignLogError,
    Intake,
    Source,
    admit,
    lost_range,
)
from pipeline.table import DeltaLog, TableError
from schemas.claims import ClaimStore, ClaimStoreError
from schemas.settings import Settings
from schemas.status import PartitionStatus, StreamStatus

log = structlog.get_logger()
T = TypeVar("T")

SESSION_S = 10.0
"""A killed worker's partitions are given to another one after this long."""
TICK_S = 1.0
SEEK_AGAIN_S = 5.0
"""Records wait but none arrives: the consumer is asked again for the wanted one."""
STALLED_S = 60.0
"""The process ends when nothing has moved for this long although records wait."""
BACKOFF_S = (0.5, 15.0)
"""First and longest wait before a failed commit is tried again."""
BROKER_S = 10.0
PART_BYTES = 16 << 20
"""A commit takes records of about this size: rows of all tables are built in memory, several times as large."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of delivered records."""

    wanted: Mapping[Source, int]
    gaps: tuple[Source, ...]


class StreamWorker:
    """Takes what Faust delivers, seeks back where it left a gap, and watches that it goes on."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counts = Counts()
        self._intake = Intake(DeltaLog(settings.tables))
        self._claims = ClaimStore(settings.traces)
        self._tables_thread = ThreadPoolExecutor(1, "tables")
        self._partitions: dict[Source, PartitionStatus] = {}
        self._checked: set[Source] = set()
        self._sought: dict[Source, int] = {}
        self._moved_at: dict[Source, float] = {}
        self._taking = False
        self._error: str | None = None
        self._healthy_at = time.monotonic()
        self.app = _app(settings)
        topic = self.app.topic(
            settings.kafka.traces_topic,
            key_type=bytes,
            value_type=bytes,
            key_serializer="raw",
            value_serializer="raw",
            allow_empty=True,
        )
        self.app.agent(topic, name="traces")(self._agent)
        self.app.on_partitions_assigned.connect(self._on_assigned)
        self.app.task(self._watch)
        self.app.page("/status")(self._status_page)
        self.app.page("/metrics")(self._metrics_page)

    def status(self) -> StreamStatus:
        """The worker's state, for ``/status``."""
        counts = self.counts
        return StreamStatus(
            partitions=[self._partitions[source] for source in sorted(self._partitions)],
            rows_written=counts.rows_written,
            dead_letters=counts.dead_letters.total(),
            skipped_behind=counts.skipped_behind,
            left_out=counts.left_out,
            seeks_back=counts.seeks_back,
            commits=counts.commits,
            fenced=counts.fenced,
            lost=counts.lost,
            error=self._error,
        )

    async def _agent(self, stream: StreamT[bytes]) -> None:
        stream_settings = self.settings.stream
        async for events in stream.noack_take(stream_settings.flush_records, within=stream_settings.flush_s):
            self._taking = True
            try:
                for part in _parts(events):
                    await self._take(part)
            except Exception as error:  # noqa: BLE001 - Faust would start the agent anew for ever: whatever it is, end the process
                await self.app.crash(error)
                return
            finally:
                self._taking = False

    async def _take(self, events: Sequence[EventT[bytes]]) -> None:
        """Return when the tables hold what they take of these records; the rest comes again."""
        assigned = self.app.consumer.assignment()
        records: dict[Source, list[Record]] = {}
        for event in events:
            if event.message.tp in assigned:
                record = _record(event)
                records.setdefault(Source(record.topic, record.partition), []).append(record)
            else:
                self.counts.left_out += 1
        for source in records.keys() - self._checked:
            await self._check_log(source)
        stored = await self._persistently(lambda: self._store(records))
        for source, wanted in stored.wanted.items():
            self._note(source, wanted)
        for event in events:
            if event.message.offset < stored.wanted.get(Source(*event.message.tp), 0):
                event.ack()
        for source in stored.gaps:
            if self._sought.get(source) != stored.wanted[source]:
                await self._seek_back(source)

    def _store(self, records: Mapping[Source, Sequence[Record]]) -> Stored:
        """Decide, build and commit, on the thread of the tables."""
        admitted = {
            source: admit(self._intake.wanted(source), [record.offset for record in arrived])
            for source, arrived in records.items()
        }
        taken = {source: [records[source][i] for i in plan.taken] for source, plan in admitted.items() if plan.taken}
        context = self.settings.stream.context_tokens
        built = {source: build(of_one, context, self._claims.get) for source, of_one in taken.items()}
        if built:
            self._intake.commit([Batch(source, taken[source][-1].offset, built[source].rows) for source in built])
            self.counts.commits += 1
        for source, made in built.items():
            self._count(taken[source], made)
        self.counts.skipped_behind += sum(plan.behind for plan in admitted.values())
        self.counts.left_out += sum(plan.ahead for plan in admitted.values())
        wanted = {source: self._intake.wanted(source) for source in records}
        return Stored(wanted, tuple(source for source, plan in admitted.items() if plan.gap))

    def _count(self, taken: Sequence[Record], built: Built) -> None:
        self.counts.rows_written += built.rows["traces"].num_rows
        self.counts.dead_letters.update(built.dead)
        self.counts.bytes_taken += sum(len(record.value or b"") for record in taken)

    async def _persistently(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the thread of the tables until it succeeds: while it fails, consumption waits."""
        wait, longest = BACKOFF_S
        while True:
            try:
                done = await self._on_tables(work)
            except FencedError as error:
                self.counts.fenced += 1
                log.warning("commit_fenced", why=str(error))
            except (TableError, ConflictError, ClaimStoreError) as error:
                self.counts.table_errors += 1
                self._error = str(error)
                self._healthy_at = time.monotonic()
                log.warning("table_failed", why=str(error), retry_in_s=wait)
                await asyncio.sleep(wait)
                wait = min(wait * 2, longest)
            else:
                self._error = None
                return done

    async def _on_tables(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._tables_thread, work)

    async def _seek_back(self, source: Source) -> None:
        """Ask the consumer for the wanted record again."""
        wanted = await self._check_log(source)
        if TP(*source) not in self.app.consumer.assignment():
            return
        self._sought[source] = wanted
        self.counts.seeks_back += 1
        log.warning("seek_back", topic=source.topic, partition=source.partition, offset=wanted)
        await self.app.consumer.seek_wait({TP(*source): wanted})

    async def _check_log(self, source: Source) -> int:
        """The wanted offset, after writing down what the broker has deleted before it.

        Raises:
            ForeignLogError: the topic ends before the wanted offset.
        """
        start, end = await self._log_bounds(source)

        def settle() -> int:
            wanted = self._intake.wanted(source)
            lost = lost_range(source, wanted, start, end)
            if lost:
                self._intake.record_loss(source, lost, time.time_ns() // 1000)
                self.counts.lost += len(lost)
                log.error("records_lost_to_retention", partition=source.partition, first=lost.start, records=len(lost))
            return self._intake.wanted(source)

        wanted = await self._persistently(settle)
        self._checked.add(source)
        self._note(source, wanted, end)
        return wanted

    async def _log_bounds(self, source: Source) -> tuple[int, int]:
        tp, consumer = TP(*source), self.app.consumer
        starts = await asyncio.wait_for(consumer.earliest_offsets(tp), BROKER_S)
        ends = await asyncio.wait_for(consumer.highwaters(tp), BROKER_S)
        return starts[tp], ends[tp]

    def _note(self, source: Source, wanted: int, end: int | None = None) -> None:
        known = self._partitions.get(source)
        if known is None or known.wanted != wanted:
            self._moved_at[source] = time.monotonic()
        newest = max(wanted, end if end is not None else known.end if known else 0)
        self._partitions[source] = PartitionStatus(partition=source.partition, wanted=wanted, end=newest)

    async def _on_assigned(self, _app: AppT, assigned: set[TP], **_: object) -> None:
        """Another worker may have written since: the tables are asked again where each partition stands."""
        log.info("partitions_assigned", partitions=sorted(tp.partition for tp in assigned))
        self._partitions.clear()
        self._checked.clear()
        self._sought.clear()
        self._moved_at.clear()
        # Behind a commit that is still running: it ends before its thread forgets.
        self._tables_thread.submit(self._intake.forget, [Source(*tp) for tp in assigned])

    async def _watch(self) -> None:
        """Compare tables and broker, ask again for records that do not come, and keep the watchdog quiet."""
        _Watchdog(lambda: self._healthy_at).start()
        while not self.app.should_stop:
            try:
                if await self._goes_on():
                    self._healthy_at = time.monotonic()
            except ForeignLogError as error:
                await self.app.crash(error)
                return
            except Exception as error:  # noqa: BLE001 - the consumer raises Faust's, aiokafka's and asyncio's errors; lasting ones end in the watchdog
                self._error = f"broker at {self.settings.kafka.bootstrap} (kafka.bootstrap): {error!r}"
                log.warning("broker_not_answering", why=repr(error))
            await asyncio.sleep(TICK_S)

    async def _goes_on(self) -> bool:
        """Whether no partition stands still while records wait in it."""
        going = True
        for tp in sorted(self.app.consumer.assignment()):
            source = Source(tp.topic, tp.partition)
            known = self._partitions.get(source)
            if self._taking and known is not None:
                _, end = await self._log_bounds(source)
                self._note(source, known.wanted, end)
            else:
                await self._check_log(source)
            idle = self._idle_s(source)
            if idle > SEEK_AGAIN_S and not self._taking:
                await self._seek_back(source)
            going &= idle < 2 * SEEK_AGAIN_S
        return going

    def _idle_s(self, source: Source) -> float:
        """For how long records have waited in a partition of which none was taken."""
        now = time.monotonic()
        partition = self._partitions.get(source)
        if partition is None or partition.wanted >= partition.end:
            self._moved_at[source] = now
        return now - self._moved_at[source]

    async def _status_page(self, _request: Request) -> Response:
        return self.app.web.bytes(self.status().model_dump_json().encode(), content_type="application/json")

    async def _metrics_page(self, _request: Request) -> Response:
        page = exposition(self.counts, self._partitions.values())
        return self.app.web.bytes(page, headers={"Content-Type": CONTENT_TYPE_LATEST})


class _Watchdog(threading.Thread):
    """Ends the process when nothing was healthy for too long; a thread, because the event loop may be what hangs."""

    def __init__(self, healthy_at: Callable[[], float]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._healthy_at = healthy_at

    def run(self) -> None:
        while time.monotonic() - self._healthy_at() < STALLED_S:
            time.sleep(TICK_S)
        log.critical("stalled", seconds=STALLED_S, why="records wait and none is taken; the supervisor starts me again")
        # Not sys.exit: a hanging event loop would wait for itself. The tables are the truth, so nothing is lost.
        os._exit(1)


def run(settings: Settings) -> None:
    """Bring traces into the tables until SIGTERM or SIGINT.

    Raises:
        TopicError: the broker does not answer or does not have what is needed.
        TableError: the tables cannot be opened or created.
        SystemExit: with a code other than 0 after a crash.
    """
    # It writes a hundred lines a second while the broker is away; the watch says it once a tick.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    topics.create(settings.kafka)
    DeltaLog(settings.tables).create()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    worker = faust.Worker(
        StreamWorker(settings).app, loop=loop, quiet=True, override_logging=False, redirect_stdouts=False
    )
    try:
        worker.execute_from_commandline()
    except SystemExit as end:
        if end.code:
            raise


def _app(settings: Settings) -> faust.App:
    kafka, stream = settings.kafka, settings.stream
    unknown = ignored(kafka.client)
    if unknown:
        log.warning("kafka_client_options_ignored", options=unknown, by="the stream's consumer")
    return faust.App(
        stream.group,
        broker=[f"kafka://{address.strip()}" for address in kafka.bootstrap.split(",")],
        broker_credentials=credentials(kafka.client),
        broker_session_timeout=SESSION_S,
        broker_heartbeat_interval=SESSION_S / 4,
        broker_request_timeout=30.0,
        broker_max_poll_records=stream.flush_records,
        consumer_max_fetch_size=max(1 << 20, 2 * kafka.max_message_bytes),
        consumer_auto_offset_reset="earliest",
        stream_buffer_maxsize=stream.flush_records,
        datadir=Path(stream.data_dir).resolve(),
        store="memory://",
        topic_allow_declare=False,
        topic_disable_leader=True,
        web_host=stream.host,
        web_bind=stream.host,
        web_port=stream.port,
        autodiscover=False,
    )


def _record(event: EventT[bytes]) -> Record:
    message = event.message
    return Record(
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        time_us=round(message.timestamp * 1e6),
        key=message.key,
        value=message.value,
        headers=tuple(message.headers or ()),
    )


def _parts(events: Sequence[EventT[bytes]]) -> Iterator[list[EventT[bytes]]]:
    part: list[EventT[bytes]] = []
    size = 0
    for event in events:
        part.append(event)
        size += _record(event).size
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part
