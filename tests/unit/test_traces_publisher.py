"""Every captured row ends in exactly one of published, shed and pending, and the engine never waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from confluent_kafka import KafkaError, KafkaException
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.settings import Kafka, SettingsError, Traces
from schemas.trace import CONTENT_TYPE, Chunk, Round, decode, fingerprint
from serving.chunks import Origin
from serving.engine import Request
from serving.traces import OVERDUE_S, TracePublisher, connect

ORIGIN = Origin("node-a", "t" * 32, "line")


@dataclass
class FakeProducer:
    """Acknowledges, refuses or holds messages, and reports from ``poll`` as the real one does."""

    mode: str = "ack"
    delivered: list[Chunk] = field(default_factory=list)
    headers: list[list[tuple[str, bytes]]] = field(default_factory=list)
    held: list[tuple[bytes, Callable[..., None]]] = field(default_factory=list)
    reports: list[Callable[[], None]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)
    polls: int = 0

    def produce(self, topic: str, *, value: bytes, key: bytes, headers: Any, on_delivery: Callable[..., None]) -> None:
        assert key == decode(value).envelope.request.encode()
        with self.lock:
            self.headers.append(headers)
            match self.mode:
                case "ack":
                    self._deliver(value, on_delivery)
                case "hold":
                    self.held.append((value, on_delivery))
                case "full":
                    raise BufferError
                case "fatal":
                    raise KafkaException(KafkaError(KafkaError._FATAL))
                case _:
                    code = {"refuse": KafkaError.TOPIC_AUTHORIZATION_FAILED, "large": KafkaError.MSG_SIZE_TOO_LARGE}
                    error = KafkaError(code[self.mode])
                    self.reports.append(lambda: on_delivery(error, None))

    def poll(self, timeout: float) -> int:
        with self.lock:
            self.polls += 1
            reports, self.reports = self.reports, []
        for report in reports:
            report()
        return len(reports)

    def flush(self, timeout: float) -> int:
        self.poll(0)
        return len(self.held)

    def purge(self) -> None:
        with self.lock:
            for _, on_delivery in self.held:
                error = KafkaError(KafkaError._PURGE_QUEUE)
                self.reports.append(lambda on_delivery=on_delivery, error=error: on_delivery(error, None))
            self.held.clear()

    def come_back(self) -> None:
        with self.lock:
            self.mode = "ack"
            for value, on_delivery in self.held:
                self._deliver(value, on_delivery)
            self.held.clear()

    def _deliver(self, value: bytes, on_delivery: Callable[..., None]) -> None:
        self.delivered.append(decode(value))
        self.reports.append(lambda: on_delivery(None, None))

    @property
    def rows(self) -> int:
        return sum(len(chunk.rounds) for chunk in self.delivered)


class Bench:
    """A publisher on a fake producer and a clock that stands still until it is told to go."""

    def __init__(self, **traces: Any) -> None:
        self.now = 0.0
        self.producers = [FakeProducer()]
        self.on_error: Callable[[Any], None] = lambda _: None

        def make(_kafka: Kafka, _traces: Traces, on_error: Callable[[Any], None]) -> FakeProducer:
            self.on_error = on_error
            return self.producers[-1]

        self.publisher = TracePublisher(
            Kafka(max_message_bytes=20_000),
            Traces(breaker_after=2, breaker_probe_s=5, **traces),
            make,
            lambda: self.now,
        )
        self.publisher.start(ORIGIN)
        self.sent = 0

    @property
    def producer(self) -> FakeProducer:
        return self.producers[-1]

    def send(self, rounds: int = 1, tokens: int = 3) -> None:
        """One whole request."""
        self.sent += 1
        request = Request(f"chatcmpl-{self.sent}", (1,), 5)
        for number in range(rounds):
            last = number == rounds - 1
            self.publisher.record(request, (a_round(number, tokens),), "stop" if last else None)

    def settle(self) -> None:
        """Wait until the publisher's thread has nothing to do but wait for reports."""
        eventually(self.publisher._intake.empty)
        seen = self.producer.polls
        eventually(lambda: self.producer.polls >= seen + 2)


def a_round(number: int, tokens: int = 3) -> Round:
    return Round(
        round=number,
        position=number * tokens,
        tokens=tuple(range(tokens)) if number == 0 else (1, *range(tokens - 1)),
        features=np.zeros((tokens, 6), np.uint16),
        draft_tokens=() if number == 0 else tuple(range(tokens - 1)),
        draft_parents=() if number == 0 else tuple(range(-1, tokens - 2)),
        draft_logprobs=() if number == 0 else (-1.0,) * (tokens - 1),
        accepted=() if number == 0 else tuple(range(tokens - 1)),
        bonus=1,
        top_ids=np.zeros((1 if number == 0 else tokens, 2), np.int32),
        top_logprobs=np.zeros((1 if number == 0 else tokens, 2), np.float32),
        speculator="" if number == 0 else "7",
        draft_us=1,
        verify_us=1,
        time_us=1,
    )


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def open_breaker(bench: Bench) -> None:
    bench.producer.mode = "hold"
    bench.send()
    bench.send()
    bench.settle()
    bench.now += OVERDUE_S
    eventually(lambda: bench.publisher.breaker == "open")


def test_a_finished_request_is_one_message_with_its_headers() -> None:
    bench = Bench()
    bench.send(rounds=4)
    counts = bench.publisher.close(1)
    (chunk,) = bench.producer.delivered
    assert [r.round for r in chunk.rounds] == [0, 1, 2, 3]
    assert (chunk.envelope.last, chunk.envelope.finish) == (True, "stop")
    assert dict(bench.producer.headers[0]) == {
        "content-type": CONTENT_TYPE.encode(),
        "schema": fingerprint().encode(),
        "node": b"node-a",
        "target": b"t" * 32,
        "speculator": b"7",
        "rows": b"4",
    }
    assert (counts.captured, counts.published, counts.shed, counts.pending) == (4, 4, {}, 0)


def test_rows_of_a_cut_prompt_are_counted_as_the_wire_has_them() -> None:
    bench = Bench()
    bench.send(tokens=5000)
    counts = bench.publisher.close(1)
    assert len(bench.producer.delivered) > 3
    assert counts.captured == counts.published == bench.producer.rows > 1


def test_a_cancelled_request_publishes_what_was_captured() -> None:
    bench = Bench()
    request = Request("chatcmpl-1", (1,), 5)
    bench.publisher.record(request, (a_round(0), a_round(1)), None)
    bench.publisher.record(request, (), "cancelled")
    bench.publisher.close(1)
    (chunk,) = bench.producer.delivered
    assert (len(chunk.rounds), chunk.envelope.finish) == (2, "cancelled")


def test_a_request_that_may_not_be_traced_leaves_nothing() -> None:
    bench = Bench()
    bench.publisher.record(Request("chatcmpl-1", (1,), 5, trace=False), (a_round(0),), "stop")
    assert (bench.publisher.close(1).captured, bench.producer.delivered) == (0, [])


def test_beyond_the_bound_the_newest_rows_are_shed_and_the_request_still_ends() -> None:
    bench = Bench(queue_bytes=1 << 20)
    bench.producer.mode = "hold"
    for _ in range(40):
        bench.send(tokens=3000)
    bench.settle()
    counts = bench.publisher.counts()
    assert counts.pending_bytes <= 1 << 20
    assert counts.shed["queue_full"] > 0
    assert counts.captured == counts.published + counts.rows_shed + counts.pending
    assert bench.publisher._open == {}
    bench.producer.come_back()
    assert bench.publisher.close(1).pending == 0
    assert {c.envelope.request for c in bench.producer.delivered} >= {"chatcmpl-1", "chatcmpl-2"}


def test_a_broker_that_is_away_makes_chunks_wait_and_they_arrive_once_when_it_is_back() -> None:
    bench = Bench()
    open_breaker(bench)
    assert (bench.publisher.counts().pending, bench.publisher.counts().shed) == (2, {})
    bench.producer.come_back()
    eventually(lambda: bench.publisher.breaker == "closed")
    bench.send()
    counts = bench.publisher.close(1)
    assert (counts.published, counts.shed) == (3, {})
    assert [c.envelope.request for c in bench.producer.delivered] == ["chatcmpl-1", "chatcmpl-2", "chatcmpl-3"]


def test_while_the_breaker_is_open_chunks_are_shed_unsent_but_for_one_probe_per_interval() -> None:
    bench = Bench()
    open_breaker(bench)
    bench.send()
    eventually(lambda: bench.publisher.counts().shed == {"breaker_open": 1})
    bench.now += 5
    bench.send()
    bench.settle()
    assert (len(bench.producer.held), bench.publisher.breaker) == (3, "half_open")
    bench.send()
    eventually(lambda: bench.publisher.counts().shed == {"breaker_open": 2})
    bench.producer.come_back()
    counts = bench.publisher.close(1)
    assert (counts.published, counts.pending) == (3, 0)


def test_what_the_broker_refuses_is_shed_and_opens_the_breaker() -> None:
    bench = Bench()
    bench.producer.mode = "refuse"
    bench.send()
    bench.send()
    eventually(lambda: bench.publisher.breaker == "open")
    assert bench.publisher.close(1).shed == {"refused": 2}


def test_a_chunk_that_is_too_large_says_nothing_about_the_broker() -> None:
    bench = Bench()
    bench.producer.mode = "large"
    for _ in range(5):
        bench.send()
    assert bench.publisher.close(1).shed == {"too_large": 5}
    assert bench.publisher.breaker == "closed"


def test_what_is_in_hand_when_the_node_closes_is_unconfirmed() -> None:
    bench = Bench()
    bench.producer.mode = "hold"
    bench.send(rounds=3)
    counts = bench.publisher.close(0.1)
    assert (counts.captured, counts.shed, counts.pending, counts.pending_bytes) == (3, {"unconfirmed": 3}, 0, 0)


def test_after_closing_rows_are_turned_away_and_counted() -> None:
    bench = Bench()
    bench.publisher.close(1)
    bench.send(rounds=2)
    counts = bench.publisher.counts()
    assert (counts.captured, counts.shed, counts.pending) == (2, {"closed": 2}, 0)


def test_a_fatal_error_of_the_client_gets_a_new_producer() -> None:
    bench = Bench()
    broken = bench.producer
    broken.mode = "hold"
    bench.send()
    bench.settle()
    bench.producers.append(FakeProducer())
    bench.on_error(KafkaError(KafkaError._FATAL, "fatal", fatal=True))
    eventually(lambda: bench.publisher.counts().shed == {"unconfirmed": 1})
    bench.send()
    counts = bench.publisher.close(1)
    assert (counts.published, bench.producer.rows, broken.delivered) == (1, 1, [])


def test_malformed_rounds_neither_raise_nor_end_the_publisher() -> None:
    bench = Bench()
    malformed = replace(a_round(0), features=None)  # type: ignore[arg-type]
    bench.publisher.record(Request("bad", (1,), 5), (malformed,), "stop")
    unencodable = replace(a_round(0), tokens=(2**40,), features=np.zeros((1, 6), np.uint16))
    bench.publisher.record(Request("worse", (1,), 5), (unencodable,), "stop")
    bench.send()
    counts = bench.publisher.close(1)
    assert (counts.captured, counts.published, counts.shed, counts.pending) == (3, 1, {"unencodable": 2}, 0)


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["ack", "hold", "refuse", "large", "full", "fatal", "back"]),
            st.integers(1, 5),
            st.sampled_from([3, 2000]),
            st.floats(0, 12),
        ),
        max_size=12,
    )
)
def test_every_row_ends_in_exactly_one_way(steps: list[tuple[str, int, int, float]]) -> None:
    bench = Bench(queue_bytes=1 << 20)
    for mode, rounds, tokens, passes in steps:
        bench.now += passes
        if mode == "back":
            bench.producer.come_back()
        else:
            bench.producer.mode = mode
        bench.send(rounds, tokens if rounds == 1 else 3)
        counts = bench.publisher.counts()
        assert counts.captured == counts.published + counts.rows_shed + counts.pending
    counts = bench.publisher.close(0.1)
    assert counts.captured == counts.published + counts.rows_shed
    assert counts.published == bench.producer.rows
    assert (counts.pending, counts.pending_bytes) == (0, 0)


def test_an_unknown_kafka_option_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(SettingsError, match=r"kafka\.client.*no\.such\.option"):
        connect(Kafka(client={"no.such.option": "1"}), Traces(), lambda _: None)
