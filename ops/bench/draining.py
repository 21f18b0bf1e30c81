"""Emptying a topic in different ways: stream workers into their tables, and the two loops they are compared with."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pyarrow as pa
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka import Message as Consumed
from deltalake import write_deltalake

from ops.bench import embedded
from ops.bench.messages import Message
from ops.local.parts import answers
from ops.local.process import Process
from pipeline import topics
from pipeline.delta import DeltaLog
from pipeline.kafka_admin import client
from pipeline.offsets import Source, transaction_id
from pipeline.worker import PART_BYTES
from schemas.errors import UserError
from schemas.settings import Kafka, Settings, Tables, to_environ
from schemas.trace.record import CHECKSUM_BYTES

PARTITIONS = 2
_READY_S = 120.0
_DRAIN_S = 600.0
_POLL_S = 0.02
_CONSUMED_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Load:
    """What is in a topic."""

    messages: int
    verify_steps: int
    tokens: int
    size: int

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Load:
        """Of these."""
        return cls(
            len(messages),
            sum(m.verify_steps for m in messages),
            sum(m.tokens for m in messages),
            sum(len(m.value) for m in messages),
        )


@dataclass(frozen=True, slots=True)
class Took:
    """What emptying a topic took."""

    seconds: float
    processor: float
    """Seconds of processor time, of all processes that did it."""


@dataclass(frozen=True, slots=True)
class Tabled:
    """What workers left."""

    took: Took
    peak_rss: int | None
    """Bytes that the largest worker had in memory at most; None where the system does not say."""
    tables: Path


class Ground:
    """A broker's topics and folders for tables, one after the other."""

    def __init__(self, settings: Settings, bootstrap: str, folder: Path) -> None:
        self._settings, self._bootstrap, self._folder = settings, bootstrap, folder
        self._numbers = iter(range(1_000_000))

    def settings(self) -> Settings:
        """With a topic, a group and tables of their own; the topic is there."""
        name = f"bench-{next(self._numbers)}"
        kafka = Kafka(
            bootstrap_servers=self._bootstrap,
            traces_topic=name,
            partitions=PARTITIONS,
            max_message_bytes=self._settings.kafka.max_message_bytes,
        )
        topics.create(kafka)
        folder = self._folder / name
        stream = self._settings.stream.model_copy(
            update={"group_id": name, "data_dir": str(folder / "worker"), "host": "127.0.0.1"}
        )
        return self._settings.model_copy(
            update={"kafka": kafka, "tables": Tables(uri=str(folder / "tables")), "stream": stream}
        )

    def forget(self, settings: Settings) -> None:
        """Free the disk space of the tables."""
        shutil.rmtree(self._folder / settings.kafka.traces_topic, ignore_errors=True)


def publish(kafka: Kafka, messages: Sequence[Message]) -> None:
    """Write all messages, spread evenly over the partitions.

    Raises:
        UserError: the broker refused one.
    """
    errors: list[str] = []

    def delivered(error: KafkaError | None, _message: Consumed) -> None:
        if error is not None:
            errors.append(error.str())

    producer = Producer(client(kafka, **{"linger.ms": 20, "message.max.bytes": kafka.max_message_bytes}))
    for number, message in enumerate(messages):
        send = partial(
            producer.produce,
            kafka.traces_topic,
            message.value,
            key=message.key,
            partition=number % PARTITIONS,
            headers=list(message.headers),
            on_delivery=delivered,
        )
        while True:
            try:
                send()
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()
    if errors:
        raise UserError(f"{len(errors)} messages were not published: {errors[0]}")


def read_only(kafka: Kafka) -> Took:
    """A plain consumer reads the topic and does nothing."""
    with _consumer(kafka) as consumer:
        watch = _Watch()
        for _ in _values(consumer):
            pass
        return watch.took()


def bare_loop(settings: Settings) -> Took:
    """A loop reads the topic, opens the Arrow streams and appends their verify steps to one table.

    It flushes as a worker does, and does nothing else: no checks, no shapes, no dead letters, nothing exactly once.
    """
    table = f"{settings.tables.uri}-bare"
    with _consumer(settings.kafka) as consumer:
        watch = _Watch()
        part: list[bytes] = []
        size = 0
        for value in _values(consumer):
            part.append(value)
            size += len(value)
            if len(part) >= settings.stream.flush_records or size >= PART_BYTES:
                _append(table, part)
                part, size = [], 0
        if part:
            _append(table, part)
        return watch.took()


class _Watch:
    """Runs from its making on: the clock, and this process's processor time or that of the given processes."""

    def __init__(self, processes: Sequence[Process] = ()) -> None:
        self._processes = [psutil.Process(process.pid) for process in processes]
        self._clock, self._processor = time.perf_counter(), self._used()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._clock

    def took(self) -> Took:
        return Took(self.seconds, self._used() - self._processor)

    def _used(self) -> float:
        if not self._processes:
            return time.process_time()
        return sum(sum(process.cpu_times()[:2]) for process in self._processes)


def _append(table: str, values: Sequence[bytes]) -> None:
    opened = [pa.ipc.open_stream(pa.py_buffer(value)[:-CHECKSUM_BYTES]).read_all() for value in values]
    write_deltalake(table, pa.concat_tables([rows.replace_schema_metadata() for rows in opened]), mode="append")


def drain(settings: Settings, workers: int, messages: Sequence[Message]) -> Tabled:
    """Let so many stream workers bring the messages into the tables.

    They are up and know their partitions before anything is published, and are held while it is: none of them gets a
    start, and the publisher takes no time of theirs.

    Raises:
        StartError: a worker did not come up.
        UserError: a worker ended, or the tables do not hold everything in time.
    """
    with running(settings, workers) as processes:
        with _held(processes):
            publish(settings.kafka, messages)
            watch = _Watch(processes)
        log, kafka = DeltaLog(settings.tables), settings.kafka
        missing = {Source(kafka.traces_topic, p): len(range(p, len(messages), PARTITIONS)) for p in range(PARTITIONS)}
        while any(contained(log, source) < end for source, end in missing.items()):
            _see_that_all_goes_on(processes, watch.seconds)
            time.sleep(_POLL_S)
        took = watch.took()
        peaks = [peak for process in processes if (peak := _peak_rss(process)) is not None]
        return Tabled(took, max(peaks, default=None), Path(settings.tables.uri))


@contextmanager
def running(settings: Settings, workers: int) -> Iterator[list[Process]]:
    """Worker processes that share the partitions and are ready for records."""
    with ExitStack() as undo:
        processes = []
        urls = []
        for number in range(workers):
            stream = settings.stream.model_copy(update={"port": embedded.free_port()})
            process = _process(settings.model_copy(update={"stream": stream}), number)
            process.start()
            undo.callback(process.stop)
            processes.append(process)
            urls.append(f"http://{stream.host}:{stream.port}")
        for process, url in zip(processes, urls, strict=True):
            process.wait_ready(lambda url=url: _has(url, PARTITIONS // workers), _READY_S)  # type: ignore[misc]
        yield processes


def contained(log: DeltaLog, source: Source) -> int:
    """How many records of a partition have all their rows in the tables: ``accepted`` is written last."""
    last = log.snapshot("accepted").transaction(transaction_id("accepted", source))
    return 0 if last is None else last + 1


def table_bytes(tables: Path) -> dict[str, int]:
    """Bytes of the data files of each table."""
    return {
        table.name: sum(file.stat().st_size for file in table.rglob("*.parquet") if "_delta_log" not in file.parts)
        for table in tables.iterdir()
    }


def _process(settings: Settings, number: int) -> Process:
    log = Path(settings.tables.uri).parent / f"worker-{number}.log"
    return Process("stream", [sys.executable, "-m", "ops.cli.main", "stream"], log.absolute(), to_environ(settings))


def _has(url: str, partitions: int) -> bool:
    """Whether a worker is ready and has its share of the partitions."""
    import httpx

    with suppress(httpx.HTTPError):
        return answers(f"{url}/ready") and len(httpx.get(f"{url}/status").json()["partitions"]) == partitions
    return False


@contextmanager
def _held(processes: Sequence[Process]) -> Iterator[None]:
    pids = [process.pid for process in processes if process.pid is not None]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _see_that_all_goes_on(processes: Sequence[Process], seconds: float) -> None:
    for process in processes:
        if not process.alive:
            raise UserError(f"a stream worker ended with code {process.exit_code}; read {process.log}")
    if seconds > _DRAIN_S:
        raise UserError(f"the tables lack records after {_DRAIN_S:.0f} s; read {processes[0].log}")


def _peak_rss(process: Process) -> int | None:
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024


@contextmanager
def _consumer(kafka: Kafka) -> Iterator[Consumer]:
    """A consumer at the beginning of every partition."""
    options = {"group.id": "bench", "enable.auto.commit": False, "auto.offset.reset": "earliest"}
    consumer = Consumer(client(kafka, **options))
    try:
        consumer.assign([TopicPartition(kafka.traces_topic, number, 0) for number in range(PARTITIONS)])
        yield consumer
    finally:
        consumer.close()


def _values(consumer: Consumer) -> Iterator[bytes]:
    """What the topic holds."""
    left = sum(consumer.get_watermark_offsets(partition)[1] for partition in consumer.assignment())
    while left > 0:
        for message in consumer.consume(_CONSUMED_AT_ONCE, timeout=1.0):
            if message.error():
                raise UserError(f"the topic could not be read: {message.error()}")
            left -= 1
            yield message.value() or b""
