"""The publisher with a real broker: its counts equal the topic's contents, through kills and outages."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import Consumer, Message, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from ops.local.kafka import Broker
from schemas.settings import Kafka, Traces
from schemas.trace.decoder import decode
from schemas.trace.record import VerifyStep
from serving.engines.base import Request
from serving.traces.chunks import Origin
from serving.traces.publisher import TracePublisher

ORIGIN = Origin("node-a", "t" * 32, "line")
F, K = 48, 4


@pytest.fixture
def own_broker(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Broker]:
    """A broker of the test's own, not started yet."""
    server = Broker(tmp_path / "broker", free_port(), free_port())
    yield server
    server.stop()


def make_topic(bootstrap: str, name: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for future in admin.create_topics([NewTopic(name, 2, 1)]).values():
        future.result(10)


def kafka(bootstrap: str) -> Kafka:
    return Kafka(bootstrap_servers=bootstrap, traces_topic=f"traces-{uuid.uuid4().hex}", max_message_bytes=20_000)


def read(settings: Kafka) -> list[Message]:
    """Every record of the topic."""
    consumer = Consumer(
        {"bootstrap.servers": settings.bootstrap_servers, "group.id": "test", "enable.auto.commit": False}
    )
    records = []
    for number in range(2):
        partition = TopicPartition(settings.traces_topic, number, 0)
        _, end = consumer.get_watermark_offsets(partition, timeout=10)
        consumer.assign([partition])
        while len([r for r in records if r.partition() == number]) < end:
            record = consumer.poll(10)
            assert record is not None
            assert record.error() is None
            records.append(record)
    consumer.close()
    return records


def verify_steps(rng: np.random.Generator, prompt: int, count: int) -> Iterator[VerifyStep]:
    position = 0
    for number in range(count):
        tokens = prompt if number == 0 else 2
        drafted = 0 if number == 0 else 1
        yield VerifyStep(
            verify_step=number,
            position=position,
            tokens=tuple(int(t) for t in rng.integers(0, 100, tokens)) if number == 0 else (1, 5),
            features=rng.integers(0, 2**16, (tokens, F)).astype(np.uint16),
            draft_tokens=(5,) * drafted,
            draft_parents=(-1,) * drafted,
            draft_logprobs=(-1.0,) * drafted,
            accepted=(0,) * drafted,
            bonus=1,
            top_ids=rng.integers(0, 100, (1 + drafted, K)).astype(np.int32),
            top_logprobs=-rng.random((1 + drafted, K)).astype(np.float32),
            speculator="3" if drafted else "",
            draft_us=1,
            verify_us=1,
            time_us=time.time_ns() // 1000,
        )
        position += tokens


class Traffic:
    """Requests from a thread of its own, as from an engine, until it is ended."""

    def __init__(self, publisher: TracePublisher, pause_s: float = 0.005) -> None:
        self.sent = 0
        self._publisher = publisher
        self._pause_s = pause_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        rng = np.random.default_rng(0)
        while not self._ending.wait(self._pause_s):
            request = Request(f"chatcmpl-{self.sent}", (1,), 5)
            made = list(verify_steps(rng, prompt=int(rng.integers(1, 400)), count=3))
            for r in made:
                self._publisher.record(request, (r,), "stop" if r is made[-1] else None)
            self.sent += 1


def assert_the_topic_holds_what_was_published(publisher: TracePublisher, settings: Kafka) -> None:
    """Row by row, once each, and every request's chunks in order."""
    counts = publisher.counts()
    chunks = [decode(record.value()) for record in read(settings)]
    rows = Counter((c.envelope.request, r.position) for c in chunks for r in c.verify_steps)
    assert counts.captured == counts.published + counts.rows_dropped
    assert "unconfirmed" not in counts.dropped
    assert sum(rows.values()) == counts.published
    assert max(rows.values()) == 1
    numbers: dict[str, int] = {}
    for chunk in chunks:
        assert chunk.envelope.chunk > numbers.get(chunk.envelope.request, -1)
        numbers[chunk.envelope.request] = chunk.envelope.chunk


def eventually(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_everything_is_published_once_and_below_the_limit(broker: str) -> None:
    settings = kafka(broker)
    make_topic(broker, settings.traces_topic)
    publisher = TracePublisher(settings, Traces())
    publisher.start(ORIGIN)
    traffic = Traffic(publisher)
    eventually(lambda: traffic.sent >= 200)
    traffic.end()
    counts = publisher.close(10)
    assert (counts.published, counts.dropped) == (counts.captured, {})
    assert_the_topic_holds_what_was_published(publisher, settings)
    records = read(settings)
    assert max(len(r.value() or b"") for r in records) <= settings.max_message_bytes
    assert sum(int(dict(r.headers() or [])["rows"]) for r in records) == counts.published
    assert all(r.key() == decode(r.value()).envelope.request.encode() for r in records)


def test_a_publisher_started_before_the_broker_recovers(own_broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.traces.publisher.OVERDUE_S", 0.5)
    settings = kafka(own_broker.bootstrap)
    publisher = TracePublisher(settings, Traces(circuit_breaker_probe_interval=0.2))
    publisher.start(ORIGIN)
    traffic = Traffic(publisher)
    eventually(lambda: publisher.counts().dropped.get("circuit_breaker_open", 0) > 100)
    own_broker.start()
    make_topic(own_broker.bootstrap, settings.traces_topic)
    eventually(lambda: publisher.circuit_breaker == "closed")
    published = publisher.counts().published
    eventually(lambda: publisher.counts().published > published + 100)
    traffic.end()
    publisher.close(10)
    assert_the_topic_holds_what_was_published(publisher, settings)


def test_every_row_is_counted_when_the_broker_is_killed_under_traffic(
    own_broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.traces.publisher.OVERDUE_S", 1.0)
    settings = kafka(own_broker.bootstrap)
    own_broker.start()
    make_topic(own_broker.bootstrap, settings.traces_topic)
    publisher = TracePublisher(settings, Traces(circuit_breaker_probe_interval=0.5))
    publisher.start(ORIGIN)
    traffic = Traffic(publisher)
    for _ in range(2):
        published = publisher.counts().published
        eventually(lambda published=published: publisher.counts().published > published + 300)  # type: ignore[misc]
        assert own_broker.process.pid
        os.killpg(own_broker.process.pid, signal.SIGKILL)
        eventually(lambda: publisher.circuit_breaker == "open")
        own_broker.start()
        eventually(lambda: publisher.circuit_breaker == "closed")
    eventually(lambda: publisher.counts().pending < 100)
    traffic.end()
    counts = publisher.close(10)
    assert counts.dropped["circuit_breaker_open"] > 0
    assert_the_topic_holds_what_was_published(publisher, settings)


def test_closing_without_a_broker_is_on_time_and_counts_every_row(own_broker: Broker) -> None:
    publisher = TracePublisher(kafka(own_broker.bootstrap), Traces())
    publisher.start(ORIGIN)
    traffic = Traffic(publisher)
    eventually(lambda: traffic.sent >= 20)
    traffic.end()
    started = time.monotonic()
    counts = publisher.close(1)
    assert time.monotonic() - started < 30
    assert (counts.captured, counts.published, counts.pending, counts.pending_bytes) == (counts.rows_dropped, 0, 0, 0)
