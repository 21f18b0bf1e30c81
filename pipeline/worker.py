"""The stream worker: a Faust app that brings trace records from Kafka into the tables. Wiring only.

Faust delivers, and nothing more is asked of it: ``offsets`` decides what is taken, ``batches`` what becomes of it, and
``table`` writes it. Faust is known to skip records and to fall silent; a gap is seen by its offsets, and a worker that
stands still while records wait ends itself, so that its supervisor starts it again. Three tasks meet here::

    the agent        Faust ──▶ inbox            waits while the inbox is full
    _commit          inbox ──▶ writer           waits while the tables are slow; seeks back where a gap came
    watch            broker ──▶ progress        asks again for what does not come; without it the process ends
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import faust
import structlog
from faust.types import TP, AppT, EventT, StreamT

from pipeline import http, topics
from pipeline.batches import Record
from pipeline.buffer import Inbox, Limits
from pipeline.consumer_credentials import check, credentials, ignored
from pipeline.delta import DeltaLog
from pipeline.health import TICK_S, LastCall, Vitals, Watchdog, not_live, not_ready
from pipeline.maintenance import Caretaker
from pipeline.metrics import Counts
from pipeline.offsets import ForeignLogError, Source, lost_range
from pipeline.progress import Progress
from pipeline.watermarks import BrokerAwayError, Watermarks
from pipeline.writer import Writer
from schemas.settings import Settings, SettingsError, Stream
from schemas.status import StreamStatus
from schemas.telemetry import logs, spans

log = structlog.get_logger()

REBALANCE_S = 60.0
"""For how long the group waits for workers that do not come back when partitions are given anew."""
FOREVER_S = 365 * 86400.0
SEEK_AGAIN_S = 5.0
"""Records wait but none arrives: the consumer is asked again for the wanted one."""
CONSUMER_S = 30.0
PART_BYTES = 16 << 20
"""A commit takes records of about this size: rows of all tables are built in memory, several times as large."""
HELD_BYTES = 4 * PART_BYTES
"""Records that are read while a commit runs. With half as much a worker read too little meanwhile, and brought large
messages into the tables a third more slowly."""
FETCHED_MESSAGES = 8
"""Largest messages that one fetch may bring of a partition: the next one is asked for when they are used up."""


class StreamWorker:
    """Takes what Faust delivers, seeks back where it left a gap, and watches that it goes on."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counts = Counts()
        self._writer = Writer(settings, self.counts)
        self._progress = Progress()
        # Of the workers of a group the one that has the first partition.
        first = Source(settings.kafka.traces_topic, 0)
        self.caretaker = Caretaker(settings.tables, lambda: first in self._progress.sources())
        self._watermarks = Watermarks(settings.kafka)
        self._inbox: Inbox[EventT[bytes]] = Inbox(_limits(settings.stream))
        self._sought: dict[Source, int] = {}
        self._error: str | None = None
        self._away_since: float | None = None
        self._joining_since: float | None = time.monotonic()
        self._watched_at = self._well_at = time.monotonic()
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
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_partitions_assigned.connect(self._on_assigned)
        self.app.task(self._commit)
        http.add(self.app, self.status)

    def status(self) -> StreamStatus:
        """The worker's state, for its pages."""
        counts, vitals = self.counts, self._vitals()
        return StreamStatus(
            partitions=self._progress.statuses(),
            rows_written=counts.rows_written,
            consumed_bytes=counts.bytes_taken,
            dead_letters=dict(counts.dead_letters),
            chunk_gaps=counts.gaps,
            records_skipped=counts.skipped_behind,
            records_deferred=counts.left_out,
            seeks=counts.seeks_back,
            commits=counts.commits,
            last_commit_time=self._writer.committed_at,
            commits_fenced=counts.fenced,
            table_errors=counts.table_errors,
            records_lost=counts.lost,
            buffer_bytes=self._inbox.bytes,
            not_live=not_live(vitals),
            not_ready=not_ready(vitals),
            drift=self._writer.drift.status(),
            maintenance_files=dict(self.caretaker.totals),
            error=vitals.error,
        )

    async def _agent(self, stream: StreamT[bytes]) -> None:
        async for event in stream.noack().events():
            self._progress.arrived(Source(*event.message.tp))
            await self._inbox.put(event, _record(event).size)

    async def _commit(self) -> None:
        try:
            while True:
                events = await self._inbox.take()
                await self._take(events)
                for event in events:
                    self._progress.done_with(Source(*event.message.tp))
        except Exception as error:  # noqa: BLE001 - without this task nothing is written any more: whatever it is, end the process
            await self.app.crash(error)

    async def _take(self, events: Sequence[EventT[bytes]]) -> None:
        """Return when the tables hold what they take of these records; the rest comes again."""
        assigned = self.app.consumer.assignment()
        records: dict[Source, list[Record]] = {}
        for event in events:
            if event.message.tp in assigned:
                records.setdefault(Source(*event.message.tp), []).append(_record(event))
            else:
                self.counts.left_out += 1
        for source in set(self._progress.unknown()) & records.keys():
            await self._settle_one(source)
        stored = await self._writer.store(records)
        for source, wanted in stored.wanted.items():
            self._progress.wants(source, wanted)
        for event in events:
            if event.message.offset < stored.wanted.get(Source(*event.message.tp), 0):
                event.ack()
        for source in stored.gaps:
            if self._sought.get(source) != stored.wanted[source]:
                await self._seek_back(source)

    async def _seek_back(self, source: Source) -> None:
        """Ask the consumer for the wanted record again."""
        wanted = await self._settle_one(source)
        if TP(*source) not in self.app.consumer.assignment():
            return
        self._sought[source] = wanted
        self._progress.asked(source)
        self.counts.seeks_back += 1
        log.warning("seek_back", topic=source.topic, partition=source.partition, offset=wanted)
        try:
            await asyncio.wait_for(self.app.consumer.seek_wait({TP(*source): wanted}), CONSUMER_S)
        except Exception as error:  # noqa: BLE001 - Faust's, aiokafka's and asyncio's errors: asked again later, and the watchdog is behind
            log.warning("seek_failed", partition=source.partition, why=repr(error))

    async def _settle_one(self, source: Source) -> int:
        """The wanted offset, after writing down what the broker has deleted before it.

        Raises:
            ForeignLogError: the topic ends before the wanted offset.
        """
        # The tables first: what the log says afterwards is never older than what they hold.
        wanted = await self._writer.wanted(source)
        start, end = (await self._bounds([source]))[source]
        if lost_range(source, wanted, start, end):
            wanted = await self._writer.settle(source, start)
        self._progress.reaches(source, start, end)
        self._progress.wants(source, wanted)
        return wanted

    async def _bounds(self, sources: Sequence[Source]) -> dict[Source, tuple[int, int]]:
        """Where the broker's log begins and ends, as soon as it answers."""
        while True:
            try:
                return await asyncio.to_thread(self._watermarks.bounds, sources)
            except BrokerAwayError:
                await asyncio.sleep(TICK_S)  # the watch says that it is

    async def _on_revoked(self, _app: AppT, _revoked: set[TP], **_: object) -> None:
        self._joining_since = time.monotonic()

    async def _on_assigned(self, _app: AppT, assigned: set[TP], **_: object) -> None:
        """Another worker may have written since: the tables are asked again where each partition stands."""
        log.info("partitions_assigned", partitions=sorted(tp.partition for tp in assigned))
        sources = [Source(*tp) for tp in assigned]
        self._sought.clear()
        self._progress.assign(sources)
        self._writer.forget(sources)
        self._joining_since = None

    async def watch(self) -> None:
        """Look at the broker once a tick, ask again for records that do not come, and end what is not live.

        Runs beside Faust from the beginning: Faust starts tasks only when the group has assigned partitions.
        """
        Watchdog(lambda: self._well_at).start()
        settling: asyncio.Task[None] | None = None
        while not self.app.should_stop:
            await self._look()
            if settling is None or settling.done():
                settling = asyncio.create_task(self._settle())
            self._watched_at = time.monotonic()
            if not not_live(self._vitals()):
                self._well_at = self._watched_at
            await asyncio.sleep(TICK_S)

    async def _look(self) -> None:
        """See how far the log reaches; nobody is to blame for what does not come while the broker is away."""
        sources = self._progress.sources() or [Source(self.settings.kafka.traces_topic, 0)]
        try:
            bounds = await asyncio.to_thread(self._watermarks.bounds, sources)
        except BrokerAwayError as error:
            if self._away_since is None:
                self._away_since = time.monotonic()
                log.warning("broker_away", why=str(error))
            self._error = str(error)
        else:
            if self._away_since is not None:
                log.info("broker_back", after_s=round(time.monotonic() - self._away_since))
            self._away_since = self._error = None
            for source, (start, end) in bounds.items():
                self._progress.reaches(source, start, end)
        if self._away_since is not None and self._joining_since is not None:
            self._joining_since = time.monotonic()
        if self._away_since is not None or self._joining_since is not None or self._inbox.full:
            self._progress.excuse()

    async def _settle(self) -> None:
        """Ask the tables where unknown partitions stand, and the consumer for records that do not come."""
        try:
            for source in self._progress.unsettled():
                await self._settle_one(source)
            for source in self._progress.overdue(SEEK_AGAIN_S):
                await self._seek_back(source)
        except ForeignLogError as error:
            await self.app.crash(error)

    def _vitals(self) -> Vitals:
        now = time.monotonic()
        return Vitals(
            unwatched_s=now - self._watched_at,
            joining_s=0.0 if self._joining_since is None else now - self._joining_since,
            storing_s=self._writer.busy_s,
            waiting_s={source.partition: self._progress.waiting_s(source) for source in self._progress.sources()},
            unknown=tuple(source.partition for source in self._progress.unknown()),
            error=self._writer.error or self._error,
        )


def run(settings: Settings) -> None:
    """Bring traces into the tables until SIGTERM or SIGINT; after a crash the process ends with code 1.

    Raises:
        TopicError: the broker does not answer, lets no one in, or does not have what is needed.
        TableError: the tables cannot be opened or created.
    """
    logs.configure("stream")
    spans.configure("stream", settings.telemetry)
    # It writes a hundred lines a second while the broker is away; the watch says it once a tick.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    topics.create(settings.kafka)
    check(settings.kafka)
    DeltaLog(settings.tables).create()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    ours = StreamWorker(settings)
    faust_worker = faust.Worker(ours.app, loop=loop, quiet=True, override_logging=False, redirect_stdouts=False)
    # It would write to the terminal, and between the lines of the log where there is none.
    faust_worker.spinner = None
    ours.caretaker.start()
    watching = loop.create_task(ours.watch())
    try:
        faust_worker.execute_from_commandline()
    except SystemExit as end:
        if end.code:
            # A crash leaves clients in the middle of a call, and their threads do not outlive the interpreter's end
            # without a fault: the process would end by a signal, and not with its code.
            sys.stderr.flush()
            os._exit(1)
    finally:
        watching.cancel()
        spans.close()
        LastCall().start()


def _app(settings: Settings) -> faust.App:
    kafka, stream = settings.kafka, settings.stream
    unknown = ignored(kafka.client_options)
    if unknown:
        log.warning("kafka_client_options_ignored", options=unknown, by="the stream's consumer")
    # Faust counts what it holds in records: of the largest ones no more than this.
    records = max(1, min(stream.flush_records, HELD_BYTES // kafka.max_message_bytes))
    return faust.App(
        stream.group_id,
        broker=[f"kafka://{address.strip()}" for address in kafka.bootstrap_servers.split(",")],
        broker_credentials=credentials(kafka.client_options),
        broker_session_timeout=stream.session_timeout,
        broker_heartbeat_interval=stream.session_timeout / 4,
        broker_rebalance_timeout=REBALANCE_S,
        broker_request_timeout=30.0,
        # A worker that has no partition, or whose tables are away for long, reads nothing and is well nonetheless; one
        # that left the group for that would not join it again.
        broker_max_poll_interval=FOREVER_S,
        broker_max_poll_records=records,
        consumer_max_fetch_size=max(1 << 20, FETCHED_MESSAGES * kafka.max_message_bytes),
        consumer_auto_offset_reset="earliest",
        stream_buffer_maxsize=records,
        datadir=_folder(stream.data_dir),
        store="memory://",
        topic_allow_declare=False,
        topic_disable_leader=True,
        web_host=stream.host,
        web_bind=stream.host,
        web_port=stream.port,
        autodiscover=False,
    )


def _folder(data_dir: str) -> Path:
    """Faust's folder; Faust itself ends without a word where the one above it is missing."""
    folder = Path(data_dir).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"stream.data_dir {folder}: {error.strerror}; set another folder") from error
    return folder


def _limits(stream: Stream) -> Limits:
    return Limits(stream.flush_records, PART_BYTES, stream.flush_interval, HELD_BYTES)


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
