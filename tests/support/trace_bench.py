"""A trace publisher with a fake producer and a manual clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from confluent_kafka import KafkaError, KafkaException

from schemas.settings import Kafka, Traces
from schemas.trace.decoder import decode
from schemas.trace.record import Chunk, VerifyStep
from serving.engines.base import Request
from serving.traces.chunks import Origin
from serving.traces.lag_consumer import LagConsumer
from serving.traces.publisher import TracePublisher

ORIGIN = Origin("node-a", "t" * 32, "line")


@dataclass
class FakeProducer:
    """Acknowledges, rejects or delays messages, and reports from ``poll`` as the real producer does."""

    mode: str = "ack"
    delivered: list[Chunk] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)
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
        self.values.append(value)
        self.delivered.append(decode(value))
        self.reports.append(lambda: on_delivery(None, None))

    @property
    def rows(self) -> int:
        return sum(len(chunk.verify_steps) for chunk in self.delivered)


class Bench:
    """A publisher with a fake producer and a manual clock; its thread does not run if it is not ``started``."""

    def __init__(self, *, lag: LagConsumer | None = None, started: bool = True, **traces: Any) -> None:
        self.now = 0.0
        self.producers = [FakeProducer()]
        self.on_error: Callable[[Any], None] = lambda _: None

        def make(_kafka: Kafka, _traces: Traces, on_error: Callable[[Any], None]) -> FakeProducer:
            self.on_error = on_error
            return self.producers[-1]

        self.publisher = TracePublisher(
            Kafka(max_message_bytes=20_000),
            Traces(circuit_breaker_failures=2, circuit_breaker_probe_interval=5, **traces),
            make,
            lambda: self.now,
            lag,
        )
        self.publisher._origin = ORIGIN
        if started:
            self.publisher.start(ORIGIN)
        self.sent = 0

    @property
    def producer(self) -> FakeProducer:
        return self.producers[-1]

    def send(self, verify_steps: int = 1, tokens: int = 3) -> None:
        """One whole request."""
        self.sent += 1
        request = Request(f"chatcmpl-{self.sent}", (1,), 5)
        for number in range(verify_steps):
            last = number == verify_steps - 1
            self.publisher.record(request, (a_verify_step(number, tokens),), "stop" if last else None)

    def settle(self) -> None:
        """Wait until the publisher's thread only waits for delivery reports."""
        eventually(self.publisher._captures.empty)
        seen = self.producer.polls
        eventually(lambda: self.producer.polls >= seen + 2)


def a_verify_step(number: int, tokens: int = 3) -> VerifyStep:
    return VerifyStep(
        verify_step=number,
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
