"""Ways to drain a topic: stream workers into their tables, and the two loops that they are compared with."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import psutil
import pyarrow as pa
from confluent_kafka import KafkaError, Message, Producer
from deltalake import write_deltalake

from ops.bench.embedded_kafka import consume_all, free_port, open_consumer
from ops.bench.stream.recorded_messages import TraceMessage
from ops.local.parts import is_answering
from ops.local.process import Process
from pipeline import topics
from pipeline.broker import client_config
from pipeline.delta import DeltaLog
from pipeline.offsets import SourcePartition, transaction_id
from schemas.errors import UserError
from schemas.settings import Kafka, Settings, Tables, to_environ
from schemas.trace.record import CHECKSUM_BYTES

PARTITIONS = 2
_READY_S = 120.0
_DRAIN_S = 600.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class DrainCost:
    """Time to drain a topic."""

    seconds: float
    processor_s: float
    """Of all processes that did it."""


@dataclass(frozen=True, slots=True)
class WorkerDrain:
    """A topic drained by workers."""

    cost: DrainCost
    peak_rss: int | None
    """Peak resident bytes of the largest worker; None if the system does not report it."""
    table_bytes: dict[str, int]
    """Bytes of the data files of each table."""


class TopicFactory:
    """Creates topics on a broker, with folders for their tables."""

    def __init__(self, settings: Settings, bootstrap_servers: str, folder: Path) -> None:
        self._settings, self._bootstrap_servers, self._folder = settings, bootstrap_servers, folder
        self._numbers = count()

    @contextmanager
    def new_topic(self) -> Iterator[Settings]:
        """Create a topic; the settings have a group and tables of their own, which are deleted at the end."""
        name = f"bench-{next(self._numbers)}"
        kafka = Kafka(
            bootstrap_servers=self._bootstrap_servers,
            traces_topic=name,
            partitions=PARTITIONS,
            max_message_bytes=self._settings.kafka.max_message_bytes,
        )
        topics.create(kafka)
        folder = self._folder / name
        own = {"group_id": name, "data_dir": str(folder / "worker"), "host": "127.0.0.1"}
        stream, tables = self._settings.stream.model_copy(update=own), Tables(uri=str(folder / "tables"))
        yield self._settings.model_copy(update={"kafka": kafka, "tables": tables, "stream": stream})
        shutil.rmtree(folder, ignore_errors=True)


def publish(kafka: Kafka, messages: Sequence[TraceMessage]) -> None:
    """Publish all messages, spread evenly over the partitions."""
    errors: list[str] = []

    def on_delivery(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            errors.append(error.str())

    producer = Producer(client_config(kafka, **{"linger.ms": 20, "message.max.bytes": kafka.max_message_bytes}))
    for number, message in enumerate(messages):
        send = partial(
            producer.produce,
            kafka.traces_topic,
            message.value,
            key=message.key,
            partition=number % PARTITIONS,
            headers=list(message.headers),
            on_delivery=on_delivery,
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


class _Stopwatch:
    """Clock and processor time since it was made, of this process or of the given ones."""

    def __init__(self, processes: Sequence[psutil.Process] = ()) -> None:
        self._processes = processes or (psutil.Process(),)
        self._clock, self._processor_s = time.perf_counter(), self._used_s()

    def read(self) -> DrainCost:
        return DrainCost(time.perf_counter() - self._clock, self._used_s() - self._processor_s)

    def _used_s(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._processes)


def drain_read_only(kafka: Kafka) -> DrainCost:
    """Read the topic with a plain consumer and discard the messages."""
    with open_consumer(kafka) as consumer:
        stopwatch = _Stopwatch()
        for _ in consume_all(consumer):
            pass
        return stopwatch.read()


def drain_bare_loop(settings: Settings) -> DrainCost:
    """Read the topic, open the Arrow streams, and append their rows to one table.

    The loop flushes as a worker does and omits everything else: checks, shapes, dead letters, exactly-once.
    """
    table = f"{settings.tables.uri}-bare"
    with open_consumer(settings.kafka) as consumer:
        stopwatch = _Stopwatch()
        part: list[bytes] = []
        size = 0
        for message in consume_all(consumer):
            value = message.value() or b""
            part.append(value)
            size += len(value)
            if len(part) >= settings.stream.flush_records or size >= settings.stream.flush_bytes:
                _append(table, part)
                part, size = [], 0
        if part:
            _append(table, part)
        return stopwatch.read()


def _append(table: str, values: Sequence[bytes]) -> None:
    opened = [pa.ipc.open_stream(pa.py_buffer(value)[:-CHECKSUM_BYTES]).read_all() for value in values]
    write_deltalake(table, pa.concat_tables([rows.replace_schema_metadata() for rows in opened]), mode="append")


def drain_with_workers(settings: Settings, workers: int, messages: Sequence[TraceMessage]) -> WorkerDrain:
    """Publish the messages and let the stream workers write them into the tables.

    The workers are ready and have their partitions before the messages are published, and are suspended meanwhile: no
    worker starts early, and the publisher takes no time from them.

    Raises:
        StartError: a worker did not start.
        UserError: a worker ended, or the tables do not hold all rows in time.
    """
    with running_workers(settings, workers) as processes:
        running = [psutil.Process(process.pid) for process in processes]
        for worker in running:
            worker.suspend()
        try:
            publish(settings.kafka, messages)
            stopwatch = _Stopwatch(running)
        finally:
            for worker in running:
                worker.resume()
        log, topic = DeltaLog(settings.tables), settings.kafka.traces_topic
        ends = {SourcePartition(topic, p): len(range(p, len(messages), PARTITIONS)) for p in range(PARTITIONS)}
        while any(count_committed(log, source) < end for source, end in ends.items()):
            _check_workers(processes, stopwatch.read().seconds)
            time.sleep(_POLL_S)
        cost = stopwatch.read()
        peaks = [peak for process in processes if (peak := _peak_rss(process)) is not None]
    sizes = {
        table.name: sum(file.stat().st_size for file in table.rglob("*.parquet") if "_delta_log" not in file.parts)
        for table in Path(settings.tables.uri).iterdir()
    }
    return WorkerDrain(cost, max(peaks, default=None), sizes)


@contextmanager
def running_workers(settings: Settings, workers: int) -> Iterator[list[Process]]:
    """Run worker processes that share the partitions and are ready for records."""
    with ExitStack() as undo:
        processes, urls = [], []
        for number in range(workers):
            stream = settings.stream.model_copy(update={"port": free_port()})
            log = (Path(settings.tables.uri).parent / f"worker-{number}.log").absolute()
            environ = to_environ(settings.model_copy(update={"stream": stream}))
            process = Process("stream", [sys.executable, "-m", "ops.cli.main", "stream"], log, environ)
            process.start()
            undo.callback(process.stop)
            processes.append(process)
            urls.append(f"http://{stream.host}:{stream.port}")
        for process, url in zip(processes, urls, strict=True):
            process.wait_ready(partial(_has_partitions, url, PARTITIONS // workers), _READY_S)
        yield processes


def _has_partitions(url: str, partitions: int) -> bool:
    """Return whether a worker is ready and has its share of the partitions."""
    import httpx

    with suppress(httpx.HTTPError):
        return is_answering(f"{url}/ready") and len(httpx.get(f"{url}/status").json()["partitions"]) == partitions
    return False


def count_committed(log: DeltaLog, source: SourcePartition) -> int:
    """Count the records of a partition whose rows are all in the tables: ``accepted`` is written last."""
    last = log.snapshot("accepted").transaction(transaction_id("accepted", source))
    return 0 if last is None else last + 1


def _check_workers(processes: Sequence[Process], seconds: float) -> None:
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
