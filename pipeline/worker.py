"""The stream worker: a Faust app that writes trace records from Kafka to the tables.

Faust only delivers records. ``offsets`` decides which of them are written, ``batches`` builds their rows, and
``writer`` commits the rows. Faust is known to skip records and to stop delivering. Skipped records show as a gap in the
offsets. A second consumer shows whether a gap is a hole, where no consumer receives a record. A worker that makes no
progress while records wait ends itself, so that its supervisor restarts it. So does one whose topic was deleted and
created anew: its consumer has positions and records of a log that no longer exists (``topic_logs``). Three tasks run
side by side::

    _read      Faust ──▶ buffer       waits while the buffer is full
    _commit    buffer ──▶ writer      waits while the tables are slow; passes holes, and seeks back after other gaps
    watch      broker ──▶ progress    does the same where no record arrives; the process ends without it
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

import faust
import structlog
from faust.types import TP, AppT, EventT, StreamT

from pipeline import topic_logs, topics
from pipeline.batches import Record
from pipeline.broker import BrokerError, RecordProbe, TopicError, TopicMissingError, Watermarks
from pipeline.consumer import RecordBuffer, buffer_bytes, check_connection, create_app, flush_interval_s
from pipeline.delta import DeltaLog, TableError
from pipeline.health import (
    TICK_S,
    HealthSnapshot,
    ProgressTracker,
    ShutdownTimer,
    Watchdog,
    liveness_problems,
    readiness_problems,
)
from pipeline.maintenance import MaintenanceThread
from pipeline.metrics import StreamCounters, StreamTimes, add_endpoints
from pipeline.offsets import CUT_LOG, ForeignLogError, LogRange, SourcePartition, find_gaps, find_lost_offsets
from pipeline.store_probe import UnsafeStoreError, check_store
from pipeline.topic_logs import Evidence, LastRecord, TopicLog
from pipeline.writer import TableWriter
from schemas.settings import Settings
from schemas.status import StreamStatus
from schemas.telemetry import logs, spans

log = structlog.get_logger()

SEEK_INTERVAL_S = 5.0
"""The consumer seeks to the next offset again if records wait and none arrives for so long."""
SEEK_TIMEOUT_S = 30.0
START_TIMEOUT_S = 10.0
"""Without the next offsets of the tables by then, reading begins at the group's offset, and seeks follow."""
SETTLE_TIMEOUT_S = 30.0
DATE_INTERVAL_S = 30.0
"""The time of an unread record that is not in the buffer is looked up this often: the buffer has it sooner or later."""
TOPIC_CHECK_S = 60.0
"""A hole is passed only if the topic was found not to be compacted this recently."""


class StreamWorker:
    """Writes the records that Faust delivers, seeks back after a gap, and watches its own progress."""

    def __init__(self, settings: Settings, topic_log: TopicLog, watermarks: Watermarks, probe: RecordProbe) -> None:
        self.settings = settings
        self.counters, times = StreamCounters(), StreamTimes()
        self._topic_log = topic_log
        self._writer = TableWriter(settings, self.counters, times)
        self._progress = ProgressTracker()
        # One worker of the group runs maintenance: the one that owns the first partition.
        first = topic_log.source(0)
        self.maintenance = MaintenanceThread(settings.tables, lambda: first in self._progress.sources())
        self._watermarks = watermarks
        self._probe = probe
        stream = settings.stream
        self._buffer: RecordBuffer[EventT[bytes]] = RecordBuffer(
            stream.flush_records, stream.flush_bytes, flush_interval_s(settings), buffer_bytes(stream)
        )
        self._seek_offsets: dict[SourcePartition, int] = {}
        """Offset of the last seek after a gap."""
        self._topic_checked = self._dated = time.monotonic()
        self._broker_error: str | None = None
        self._topic_missing = False
        self._unreachable_since: float | None = None
        self._joining_since: float | None = time.monotonic()
        self._last_watched = self._last_live = time.monotonic()
        self.app = create_app(settings)
        self.app.read_starts = self._read_starts
        topic = self.app.topic(
            settings.kafka.traces_topic,
            key_type=bytes,
            value_type=bytes,
            key_serializer="raw",
            value_serializer="raw",
            allow_empty=True,
        )
        self.app.agent(topic, name="traces")(self._read)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_partitions_assigned.connect(self._on_assigned)
        self.app.task(self._commit)
        add_endpoints(self.app, self.status, times)

    def status(self) -> StreamStatus:
        """Return the worker's status for its HTTP endpoints."""
        health = self._health()
        return StreamStatus(
            **{name: value for name, value in vars(self.counters).items() if name != "dead_letters"},
            dead_letters=dict(self.counters.dead_letters),
            topic_log=self._topic_log.number,
            partitions=self._progress.statuses(),
            buffer_bytes=self._buffer.bytes,
            not_live=liveness_problems(health),
            not_ready=readiness_problems(health),
            drift=self._writer.drift.status(),
            maintenance_files=dict(self.maintenance.files),
            last_maintenance_time=self.maintenance.last_success,
            maintenance_interval_s=self.settings.tables.maintenance_interval,
            retention_s=self.settings.kafka.retention,
            error=health.error,
        )

    async def _read(self, stream: StreamT[bytes]) -> None:
        async for event in stream.noack().events():
            source = self._source(event.message.tp)
            self._progress.add_buffered(source, event.message.offset, event.message.timestamp)
            await self._buffer.put(event, _to_record(event, source).size)

    async def _commit(self) -> None:
        try:
            while True:
                events = await self._buffer.take_batch()
                await self._write(events)
                for event in events:
                    self._progress.remove_buffered(self._source(event.message.tp), event.message.offset)
        except Exception as error:  # noqa: BLE001 - without this task nothing is written: end the process after any error
            await self.app.crash(error)

    async def _write(self, events: Sequence[EventT[bytes]]) -> None:
        """Write records. Return when the tables contain the selected ones; deferred ones are delivered again."""
        assigned = self.app.consumer.assignment()
        records: dict[SourcePartition, list[Record]] = {}
        for event in events:
            if event.message.tp in assigned:
                source = self._source(event.message.tp)
                records.setdefault(source, []).append(_to_record(event, source))
            else:
                self.counters.records_deferred += 1
        # After the records were read: an id never returns, so they are of the log that had it when the worker started.
        await self._verify_topic()
        for source, delivered in records.items():
            next_offset = self._progress.next_offset(source)
            if next_offset is None or delivered[0].offset < next_offset:
                await self._verify_offset(source, compare=True)
        holes = {
            source: await self._find_holes(source, [record.offset for record in delivered])
            for source, delivered in records.items()
        }
        result = await self._writer.write(records, holes)
        for source, next_offset in result.next_offsets.items():
            self._progress.set_next_offset(source, next_offset)
        self._pause(result.paused)
        for event in events:
            if event.message.offset < result.next_offsets.get(self._source(event.message.tp), 0):
                event.ack()
        for source in result.gaps:
            if self._seek_offsets.get(source) != result.next_offsets[source]:
                await self._seek_back(source, await self._verify_offset(source))

    def _pause(self, paused: Mapping[SourcePartition, str]) -> None:
        """Pause partitions whose next record this worker cannot read."""
        for source, found in paused.items():
            if self._progress.pause(source, found):
                log.error("partition_paused", topic=source.topic, partition=source.partition, format=found)

    async def _find_holes(self, source: SourcePartition, delivered: Sequence[int]) -> list[range]:
        """Return the gaps before delivered records that are holes, up to the first one that is not."""
        holes: list[range] = []
        next_offset = self._progress.next_offset(source)
        for gap in [] if next_offset is None else find_gaps(next_offset, delivered):
            hole = range(gap.start, min(await self._find_record(source, gap.start), gap.stop))
            holes.append(hole)
            if hole != gap:
                break
        return holes

    async def _find_record(self, source: SourcePartition, offset: int) -> int:
        """Return the offset of the first record from ``offset`` on that a second consumer receives, or of the log's
        end; ``offset`` itself while the broker does not answer, and if the topic has been compacted."""
        try:
            found = await asyncio.to_thread(self._probe.find_record, source, offset)
            if found.time is not None:
                self._progress.set_found(source, offset, found.time)
            if found.offset > offset:
                await self._verify_topic()
            if found.offset > offset and time.monotonic() > self._topic_checked + TOPIC_CHECK_S:
                await asyncio.to_thread(topics.check, self.settings.kafka)
                self._topic_checked = time.monotonic()
        except (BrokerError, TopicError) as error:
            log.warning("probe_failed", partition=source.partition, why=str(error))
            return offset
        return found.offset

    async def _seek_back(self, source: SourcePartition, next_offset: int) -> None:
        """Move the consumer to the next offset of the tables."""
        tp = _to_tp(source)
        if tp not in self.app.consumer.assignment():
            return
        self._seek_offsets[source] = next_offset
        self._progress.record_seek(source)
        self.counters.seeks += 1
        log.warning("consumer_seeked_back", topic=source.topic, partition=source.partition, offset=next_offset)
        try:
            await asyncio.wait_for(self.app.consumer.seek_wait({tp: next_offset}), SEEK_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - errors of Faust, aiokafka and asyncio: the watch seeks again, and the watchdog ends the process
            log.warning("seek_failed", partition=source.partition, why=repr(error))

    async def _verify_topic(self) -> None:
        """Return once the topic is known to have the log that the worker reads, or to be deleted without a successor.

        Raises:
            TopicRecreatedError: the topic was deleted and created anew.
        """
        while self._topic_log.topic_id is not None:
            try:
                described = await asyncio.to_thread(self._watermarks.describe, self._topic_log.topic)
            except TopicMissingError:
                return
            except BrokerError:
                await asyncio.sleep(TICK_S)  # the watch logs it
            else:
                self._topic_log.check_id(described.topic_id)
                return

    async def _verify_offset(self, source: SourcePartition, *, compare: bool = False) -> int:
        """Return the next offset, after recording the offsets that the broker has deleted before it.

        Args:
            source: The partition.
            compare: Also compare the last record of the tables with the one in the log. This is done whenever the next
                offset was unknown.

        Raises:
            ForeignLogError: the log is not the one that the tables were filled from.
        """
        compare = compare or self._progress.next_offset(source) is None
        # The tables first: the log that is read afterwards is never older than their content.
        next_offset = await self._writer.next_offset(source)
        last = await self._writer.last_record(source) if compare else None
        log_range = await self._read_watermarks(source)
        await self._verify_topic()
        if last is not None:
            await self._compare_record(source, last, log_range)
        if find_lost_offsets(source, next_offset, log_range.start, log_range.end):
            next_offset = await self._writer.record_loss(source, log_range.start)
        self._progress.set_log(source, log_range)
        self._progress.set_next_offset(source, next_offset)
        return next_offset

    async def _compare_record(self, source: SourcePartition, last: LastRecord, log_range: LogRange) -> None:
        """Compare the last record of the tables with the one at its offset in the log.

        Raises:
            ForeignLogError: they differ.
        """
        while True:
            try:
                evidence = await asyncio.to_thread(topic_logs.compare, last, source, log_range, self._probe)
            except BrokerError:
                await asyncio.sleep(TICK_S)
                log_range = await self._read_watermarks(source)
                continue
            if evidence is Evidence.OTHER:
                raise ForeignLogError(
                    f"{source.topic}/{source.partition}/{last.offset}: the broker has another record there than the "
                    f"tables: {CUT_LOG}"
                )
            return

    async def _read_watermarks(self, source: SourcePartition) -> LogRange:
        """Return the range of the broker's log as soon as the broker answers."""
        while True:
            try:
                return (await asyncio.to_thread(self._watermarks.read, [source]))[source]
            except BrokerError:
                await asyncio.sleep(TICK_S)  # the watch logs it

    async def _read_starts(self, assigned: set[TP]) -> dict[TP, int]:
        """Return the next offsets of the tables, at which reading begins after an assignment."""

        async def read() -> dict[TP, int]:
            return {tp: await self._writer.next_offset(self._source(tp)) for tp in sorted(assigned)}

        try:
            return await asyncio.wait_for(read(), START_TIMEOUT_S)
        except TimeoutError:
            return {}

    async def _on_revoked(self, _app: AppT, _revoked: set[TP], **_: object) -> None:
        self._joining_since = time.monotonic()

    async def _on_assigned(self, _app: AppT, assigned: set[TP], **_: object) -> None:
        """Drop cached offsets: another worker may have written since."""
        log.info("partitions_assigned", partitions=sorted(tp.partition for tp in assigned))
        sources = [self._source(tp) for tp in assigned]
        self._seek_offsets.clear()
        self._progress.assign(sources)
        self._writer.reassign(sources)
        self._joining_since = None

    def close(self) -> None:
        """Wait for the current write to end, and for the drift events to be delivered."""
        self._writer.close()

    async def watch(self) -> None:
        """Check the broker once a tick, seek again for records that do not arrive, and end a worker that is not live.

        Runs beside Faust from the start, because Faust starts tasks only when the group has assigned partitions.
        """
        Watchdog(lambda: self._last_live).start()
        recovery: asyncio.Task[None] | None = None
        while not self.app.should_stop:
            try:
                await self._check_broker()
            except ForeignLogError as error:
                await self.app.crash(error)
                return
            if recovery is None or recovery.done():
                recovery = asyncio.create_task(self._recover())
            self._last_watched = time.monotonic()
            if not liveness_problems(self._health()):
                self._last_live = self._last_watched
            await asyncio.sleep(TICK_S)

    async def _check_broker(self) -> None:
        """Read how far the log reaches. While the broker or the topic is missing, no partition counts as stalled.

        Raises:
            TopicRecreatedError: the topic was deleted and created anew.
        """
        sources = self._progress.sources() or [self._topic_log.source(0)]
        try:
            described = await asyncio.to_thread(self._watermarks.describe, self._topic_log.topic)
            self._topic_log.check_id(described.topic_id)
            watermarks = await asyncio.to_thread(self._watermarks.read, sources)
        except BrokerError as error:
            missing = isinstance(error, TopicMissingError)
            if self._unreachable_since is None or missing != self._topic_missing:
                log.warning("topic_missing" if missing else "broker_unreachable", why=str(error))
            self._unreachable_since = self._unreachable_since or time.monotonic()
            self._broker_error, self._topic_missing = str(error), missing
        else:
            if self._unreachable_since is not None:
                log.info("broker_reachable", after_s=round(time.monotonic() - self._unreachable_since))
            self._unreachable_since = self._broker_error = None
            for source, log_range in watermarks.items():
                self._progress.set_log(source, log_range)
        if self._unreachable_since is not None and self._joining_since is not None:
            self._joining_since = time.monotonic()
        if self._unreachable_since is not None or self._joining_since is not None:
            self._progress.reset_stalls()
        elif self._buffer.full:
            self._progress.postpone_stalls(time.monotonic() - self._last_watched)

    async def _recover(self) -> None:
        """Read the next offsets that are unknown, and advance partitions whose next record does not arrive."""
        try:
            for source in self._progress.unverified():
                await self._verify_offset(source)
            for source in self._progress.stalled(SEEK_INTERVAL_S):
                await self._advance(source)
            if time.monotonic() > self._dated + DATE_INTERVAL_S:
                self._dated = time.monotonic()
                for source in self._progress.undated():
                    await self._find_record(source, self._progress.next_offset(source) or 0)
        except ForeignLogError as error:
            await self.app.crash(error)

    async def _advance(self, source: SourcePartition) -> None:
        """Pass a hole at the next offset, or seek back to it."""
        next_offset = await self._verify_offset(source)
        end = await self._find_record(source, next_offset)
        if end > next_offset:
            self._progress.set_next_offset(source, await self._writer.record_hole(source, range(next_offset, end)))
        else:
            await self._seek_back(source, next_offset)

    def _source(self, tp: TP) -> SourcePartition:
        """Return a partition of the broker under its name in the tables."""
        return self._topic_log.source(tp.partition)

    def _health(self) -> HealthSnapshot:
        now, sources = time.monotonic(), self._progress.sources()
        return HealthSnapshot(
            unwatched_s=now - self._last_watched,
            joining_s=0.0 if self._joining_since is None else now - self._joining_since,
            writing_s=self._writer.attempt_s,
            stalled_s={source.partition: self._progress.stalled_s(source) for source in sources},
            transaction_s={source.partition: self._progress.transaction_s(source) for source in sources},
            without_offset=tuple(source.partition for source in self._progress.without_offset()),
            paused=self._progress.paused(),
            error=self._writer.error or self._broker_error,
        )


def run(settings: Settings) -> None:
    """Write traces to the tables until SIGTERM or SIGINT. After a crash the process ends with code 1.

    Raises:
        TopicError: the broker does not answer, rejects the credentials, or lacks a topic.
        TableError: the tables cannot be opened or created, or their store confirms several commits of one version.
    """
    logs.configure("stream")
    spans.configure("stream", settings.telemetry)
    # aiokafka logs a hundred lines a second while the broker is unreachable; the watch logs one.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    topics.create(settings.kafka)
    check_connection(settings.kafka)
    try:
        check_store(settings.tables)
    except UnsafeStoreError:
        raise
    except TableError as error:
        log.warning("store_not_probed", why=str(error))
    tables = DeltaLog(settings.tables)
    tables.create()
    watermarks, probe = Watermarks(settings.kafka), RecordProbe(settings.kafka)
    # Before the consumer starts: what it reads is of the log that the topic has now, or of a later one.
    topic_log = _settle(settings.kafka.traces_topic, tables, watermarks, probe)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    worker = StreamWorker(settings, topic_log, watermarks, probe)
    faust_worker = faust.Worker(worker.app, loop=loop, quiet=True, override_logging=False, redirect_stdouts=False)
    # The spinner would write to the terminal, and between the lines of a log file.
    faust_worker.spinner = None
    worker.maintenance.start()
    watch = loop.create_task(worker.watch())
    try:
        faust_worker.execute_from_commandline()
    except SystemExit as end:
        if end.code:
            _end_process(1)
    finally:
        watch.cancel()
        ShutdownTimer().start()
        worker.close()
        spans.close()
    _end_process(0)


def _settle(topic: str, tables: DeltaLog, watermarks: Watermarks, probe: RecordProbe) -> TopicLog:
    """Return the log that the topic has now. It takes a moment until all brokers know a topic that was just created."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        try:
            return topic_logs.settle(topic, tables, watermarks, probe, time.time_ns() // 1000)
        except BrokerError as error:
            if time.monotonic() > deadline:
                raise TopicError(str(error)) from error
            time.sleep(TICK_S)


def _end_process(code: int) -> NoReturn:
    """End without the interpreter: threads of clients fault in its end, and a signal would replace the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _to_tp(source: SourcePartition) -> TP:
    return TP(source.broker_topic, source.partition)


def _to_record(event: EventT[bytes], source: SourcePartition) -> Record:
    message = event.message
    return Record(
        topic=source.topic,
        partition=source.partition,
        offset=message.offset,
        time_us=round(message.timestamp * 1e6),
        key=message.key,
        value=message.value,
        headers=tuple(message.headers or ()),
    )
