"""Liveness of a stream worker when Faust, its group, its broker or its store fail."""

from __future__ import annotations

import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from stream_worker import Publisher, chunk, rows_of_records, stream_settings, wait_until, worker

from ops.local.kafka import Broker
from pipeline import topics
from pipeline.delta import DeltaLog
from schemas.settings import Settings
from schemas.status import StreamStatus
from schemas.trace.record import encode

READER_FAILS_ONCE = """
from pipeline import consumer
put, calls = consumer.RecordBuffer.put, []
async def failing(self, item, size):
    calls.append(item)
    if len(calls) == 5:
        raise RuntimeError("reader failed")
    await put(self, item, size)
consumer.RecordBuffer.put = failing
"""
READER_HANGS = """
import asyncio
from pipeline import consumer, health
health.PROGRESS_TIMEOUT_S, health.STALL_TIMEOUT_S = 2.0, 5.0
put, calls = consumer.RecordBuffer.put, []
async def hanging(self, item, size):
    calls.append(item)
    await (put(self, item, size) if len(calls) < 5 else asyncio.Event().wait())
consumer.RecordBuffer.put = hanging
"""
STORE_IS_SLOW = """
import time
from pipeline import delta
append = delta.TableSnapshot.append
def slowly(self, rows, transactions):
    time.sleep(0.15)
    append(self, rows, transactions)
delta.TableSnapshot.append = slowly
"""
BUFFER_BYTES = 40_000


@dataclass(frozen=True)
class Worker:
    """A worker process and its HTTP endpoints."""

    process: subprocess.Popen[bytes]
    url: str

    def answer(self, path: str) -> int:
        """Return the status code of an endpoint; 0 without an answer."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def text(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return str(answer.read().decode())

    @property
    def status(self) -> StreamStatus:
        return StreamStatus.model_validate_json(self.text("/status"))

    @property
    def well(self) -> bool:
        return self.answer("/live") == self.answer("/ready") == 200


@dataclass
class Stage:
    """Topic, tables and publisher of a test, and workers that run until it ends."""

    settings: Settings
    publisher: Publisher
    tables: DeltaLog
    log: Path
    free_port: Callable[[], int]
    undo: ExitStack

    def start(self, before: str = "", **changed: object) -> Worker:
        stream = self.settings.stream.model_copy(update={"port": self.free_port(), **changed})
        settings = self.settings.model_copy(update={"stream": stream})
        process = self.undo.enter_context(worker(settings, self.log, before=before))
        return Worker(process, f"http://127.0.0.1:{stream.port}")

    def stored(self, records: int) -> bool:
        return wait_until(lambda: rows_of_records(self.tables) >= records, 60)

    def read_log(self) -> str:
        return self.log.read_text()[-5_000:]


def stage_on(broker: str, folder: Path, free_port: Callable[[], int], undo: ExitStack) -> Stage:
    settings = stream_settings(broker, folder, free_port())
    topics.create(settings.kafka)
    log = folder / "worker.log"
    return Stage(settings, Publisher(settings), DeltaLog(settings.tables), log, free_port, undo)


@pytest.fixture
def stage(broker: str, tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Stage]:
    with ExitStack() as undo:
        yield stage_on(broker, tmp_path, free_port, undo)


def test_spare_worker_is_ready_and_continues_after_another_is_killed(stage: Stage) -> None:
    workers = [stage.start() for _ in range(stage.settings.kafka.partitions + 1)]
    assert wait_until(lambda: all(w.well for w in workers), 60), stage.read_log()
    assert wait_until(lambda: sorted(len(w.status.partitions) for w in workers) == [0, 1, 1], 60), stage.read_log()
    stage.publisher.send_many(range(40))
    assert stage.stored(40), stage.read_log()
    busy = next(w for w in workers if w.status.partitions)
    busy.process.kill()
    stage.publisher.send_many(range(40, 80))
    assert stage.stored(80), stage.read_log()
    others = [w for w in workers if w is not busy]
    assert wait_until(lambda: all(w.well and len(w.status.partitions) == 1 for w in others), 60), stage.read_log()
    assert [w.process.poll() for w in others] == [None, None]


def test_failed_reader_is_restarted_and_its_records_are_delivered_again(stage: Stage) -> None:
    stage.publisher.send_many(range(30))
    only = stage.start(READER_FAILS_ONCE)
    assert stage.stored(30), stage.read_log()
    assert only.well
    assert only.status.seeks > 0
    assert only.process.poll() is None
    assert "reader failed" in stage.log.read_text()


def test_worker_with_a_hanging_reader_is_not_live_and_ends_itself(stage: Stage) -> None:
    stage.publisher.send_many(range(30))
    hanging = stage.start(READER_HANGS)
    statuses: list[StreamStatus] = []

    def not_live() -> bool:
        with suppress(OSError):
            statuses.append(hanging.status)
        return hanging.answer("/live") == 503 and bool(statuses[-1].not_live)

    assert wait_until(not_live, 60), stage.read_log()
    assert "records wait, and the next offset has not moved" in statuses[-1].not_live[0]
    assert hanging.process.wait(60) == 1
    stage.start()
    assert stage.stored(30), stage.read_log()


def test_worker_continues_after_an_outage_of_its_broker(tmp_path: Path, free_port: Callable[[], int]) -> None:
    broker = Broker(tmp_path / "broker", free_port(), free_port())
    broker.start()
    with ExitStack() as undo:
        undo.callback(broker.stop)
        stage = stage_on(broker.bootstrap, tmp_path, free_port, undo)
        stage.publisher.send_many(range(10))
        only = stage.start()
        assert stage.stored(10), stage.read_log()
        broker.stop()
        assert wait_until(lambda: only.answer("/ready") == 503, 60), stage.read_log()
        assert only.answer("/live") == 200
        assert "kafka.bootstrap_servers" in only.status.not_ready[0]
        broker.start()
        stage.publisher.send_many(range(10, 20))
        assert stage.stored(20), stage.read_log()
        assert wait_until(lambda: only.well, 60), stage.read_log()
        assert only.process.poll() is None


def test_slow_store_shows_as_lag_and_memory_stays_bounded(stage: Stage) -> None:
    rng = np.random.default_rng(0)
    records = 100
    for request in range(records):
        made = chunk(request, rng)
        stage.publisher.send(made, encode(made))
    stage.publisher.flush()
    slow = stage.start(STORE_IS_SLOW, flush_bytes=BUFFER_BYTES // 4)
    seen: list[StreamStatus] = []
    lags_seen: list[float] = []

    def all_stored() -> bool:
        if slow.answer("/live") == 200:
            seen.append(slow.status)
            lags = re.findall(r"^aurora_stream_lag_records\{.*\} (.*)$", slow.text("/metrics"), re.MULTILINE)
            lags_seen.append(sum(map(float, lags)))
        return rows_of_records(stage.tables) >= records

    assert wait_until(all_stored, 90), stage.read_log()
    held = [status.buffer_bytes for status in seen]
    assert BUFFER_BYTES / 2 < max(held) <= BUFFER_BYTES
    assert max(sum(p.lag for p in status.partitions) for status in seen) > records / 2
    assert max(lags_seen) > records / 2
    assert {why for status in seen for why in status.not_live} == set()
    assert wait_until(lambda: slow.well and all(p.lag == 0 for p in slow.status.partitions), 60), stage.read_log()
