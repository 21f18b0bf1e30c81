"""The trace publisher: takes verify steps from the engine's thread, and publishes them to Kafka from its own thread.

Every row ends in exactly one of three states: *published* (the broker acknowledged it), *dropped* (for a reason) or,
while the node runs, *pending*. The pending bytes are bounded; beyond the bound the newest rows are dropped.

**The counts are exact.** The producer is idempotent and never gives up on a chunk while the node runs: a message that
timed out in flight may have reached the broker, and could be counted neither as published nor as dropped. So an
unreachable broker makes chunks wait, not fail. A chunk without an acknowledgement for ``OVERDUE_S`` counts as a failed
delivery for the circuit breaker only: it stays pending, and arrives once when the broker is back. While the circuit
breaker is open, new chunks are dropped before they are sent, which is exact; one is sent as a probe every
``circuit_breaker_probe_interval``. Only where the producer ends with chunks in flight (the node closes, or the client
library reports a fatal error) their fate is unknown: those rows are dropped as ``unconfirmed``, and at most those may
be in the topic although they count as dropped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import pyarrow as pa
import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from schemas.hash_sampling import is_in_share
from schemas.settings import Kafka, SettingsError, Traces
from schemas.telemetry import spans
from schemas.trace.record import Chunk, VerifyStep, encode
from serving.engines.base import Finish, Request
from serving.traces.accounting import DropReason, TraceAccounting, TraceCounts
from serving.traces.chunks import (
    FRAME_BYTES,
    ChunkBuilder,
    ChunkSize,
    Delivery,
    FeatureTransport,
    Origin,
    chunk_bytes,
    drop_features,
    message_bytes,
    message_headers,
    row_bytes,
    split_prefill,
    strip_features,
)
from serving.traces.circuit_breaker import CircuitBreaker, CircuitState
from serving.traces.lag_consumer import LagConsumer
from serving.traces.offload import FeatureOffload
from serving.traces.sampling import BudgetQueue, is_sampled

log = structlog.get_logger()

OVERDUE_S = 10.0
"""A chunk without an acknowledgement for this long counts as a failed delivery."""

_PAUSE_S = 0.05
"""Interval at which the publisher reads its queue. Woken for each verify step, it would take the interpreter from the
engine's thread just when that one has work for the processor."""
_CIRCUIT_LEVEL = {"closed": 0, "half_open": 1, "open": 2}
_ACCESS_DENIED = (KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._SSL)
"""Errors of wrong ``kafka.client_options``; the client keeps trying."""
_TOO_LARGE = (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE)
_UNKNOWN_FATE = (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT, KafkaError._FATAL, KafkaError._MSG_TIMED_OUT)


def connect(kafka: Kafka, traces: Traces, on_error: Callable[[KafkaError], None]) -> Producer:
    """Return an idempotent producer that retries for as long as it lives.

    Raises:
        SettingsError: ``kafka.client_options`` has an option that the client does not know.
    """
    options = {
        "bootstrap.servers": kafka.bootstrap_servers,
        "enable.idempotence": True,
        "acks": "all",
        "message.timeout.ms": 0,
        "message.max.bytes": kafka.max_message_bytes,
        "queue.buffering.max.kbytes": max(1, traces.max_queue_bytes // 1024),
        "linger.ms": 20,
        "compression.type": "none",
        "reconnect.backoff.max.ms": 2000,
        "error_cb": on_error,
        "logger": logging.getLogger("librdkafka"),
    }
    try:
        return Producer({**kafka.client_options, **options})
    except (KafkaException, ValueError) as error:
        raise SettingsError(f"kafka.bootstrap_servers or kafka.client_options: {error}") from error


@dataclass(frozen=True, slots=True)
class _Capture:
    """Rows of a request from the engine's thread; no rows if only the end of the request is reported."""

    request: Request
    verify_steps: tuple[VerifyStep, ...]
    finish: Finish | None


class TracePublisher:
    """A ``TraceSink`` that publishes to Kafka.

    Args:
        kafka: Broker, topic, and maximum message size.
        traces: Limits.
        connect_producer: Creates the producer; replaced by tests.
        clock: Monotonic seconds.
        lag: Asks for fewer requests while the trainer is behind; not started yet.
    """

    def __init__(
        self,
        kafka: Kafka,
        traces: Traces,
        connect_producer: Callable[[Kafka, Traces, Callable[[KafkaError], None]], Producer] = connect,
        clock: Callable[[], float] = time.monotonic,
        lag: LagConsumer | None = None,
    ) -> None:
        self._kafka = kafka
        self._traces = traces
        self._lag = lag
        self._wanted: dict[str, bool] = {}
        """Whether a running request is published; decided at its first rows."""
        limit = ChunkSize(kafka.max_message_bytes - FRAME_BYTES, traces.claim_check_max_bytes)
        self._transport = FeatureTransport(traces.features, limit)
        self._clock = clock
        self._connect = partial(connect_producer, kafka, traces, self._on_error)
        self._producer = self._connect()
        self._breaker = CircuitBreaker(traces.circuit_breaker_failures, traces.circuit_breaker_probe_interval)
        self._accounting = TraceAccounting()
        self._offload = FeatureOffload(traces, clock) if traces.features == "claim-check" else None
        self._budget = BudgetQueue.create(kafka, traces) if traces.max_bytes_per_second else None
        self._captures: SimpleQueue[_Capture] = SimpleQueue()
        self._capture_lock = threading.Lock()
        self._closed = False
        self._ending = threading.Event()
        self._origin = Origin("", "", "")
        self._builders: dict[str, ChunkBuilder] = {}
        self._in_flight: dict[int, Delivery] = {}
        self._due: deque[tuple[float, int]] = deque()
        self._sequence = 0
        self._is_fatal = False
        self._is_denied = False
        self._close_by = 0.0
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)

    def start(self, origin: Origin) -> None:
        """Start to publish; every chunk carries ``origin``."""
        self._origin = origin
        self._thread.start()
        if self._lag:
            self._lag.start(origin.line)

    def sample(self, request: str) -> bool:
        """Return whether a request is traced. Call it once per request: it counts them."""
        sampled = is_sampled(request, self._traces.sample_ratio)
        self._accounting.count_request(sampled=sampled)
        return sampled

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        """Take the next verify steps of a request. Never blocks, never raises."""
        if not request.trace:
            return
        if not self._is_wanted(request.id, finish):
            self._accounting.reject(len(verify_steps), "trainer_lag")
            return
        try:
            kept = map(drop_features, verify_steps) if self._transport.features == "recompute" else verify_steps
            rows = tuple(part for step in kept for part in split_prefill(step, self._transport))
            size = sum(map(row_bytes, rows))
        except Exception:
            # The engine's thread must survive any error that a malformed verify step can raise.
            log.exception("verify_step_malformed", request=request.id)
            self._accounting.reject(len(verify_steps), "unencodable")
            rows, size = (), 0
        with self._capture_lock:
            if self._closed:
                self._accounting.reject(len(rows), "closed")
                return
            if not self._accounting.capture(len(rows), size, self._traces.max_queue_bytes):
                rows = ()
            if rows or finish:
                self._captures.put(_Capture(request, rows, finish))

    def counts(self) -> TraceCounts:
        """Return the counts of rows."""
        return self._accounting.counts()

    @property
    def circuit_breaker(self) -> CircuitState:
        """State of the circuit breaker of the broker."""
        return self._breaker.state

    def close(self, timeout: float) -> TraceCounts:
        """Publish the pending rows for at most ``timeout`` seconds; drop and count the rest."""
        with self._capture_lock:
            self._closed = True
            self._close_by = self._clock() + timeout
            self._ending.set()
        self._thread.join()
        if self._lag:
            self._lag.stop()
        return self.counts()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics at scrape time."""
        yield from self.counts().metrics()
        for name, peer, state in (
            ("aurora_serve_trace_circuit_breaker_state", "broker", self._breaker.state),
            (
                "aurora_serve_trace_offload_circuit_breaker_state",
                "object store",
                self._offload.state if self._offload else "closed",
            ),
        ):
            text = f"Circuit breaker of the {peer}: 0 closed, 1 half open, 2 open."
            yield GaugeMetricFamily(name, text, value=_CIRCUIT_LEVEL[state])

    def _is_wanted(self, request: str, finish: Finish | None) -> bool:
        """Return whether a request belongs to the share that the trainer asks for; the same for all of its rows."""
        if self._lag is None:
            return True
        with self._capture_lock:
            if request not in self._wanted:
                self._wanted[request] = is_in_share(request, self._lag.share)
            return self._wanted.pop(request) if finish else self._wanted[request]

    def _run(self) -> None:
        is_ending = False
        while not is_ending:
            is_ending = self._ending.wait(_PAUSE_S)
            self._take_turn()
        self._drain()

    def _take_turn(self) -> None:
        """Process what was captured since the turn before."""
        for _ in range(self._captures.qsize()):
            self._guard(partial(self._assemble, self._captures.get()))
        self._guard(self._tick)

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            # An unforeseen error must not end this thread: all later traces of the node would be lost.
            log.exception("trace_publisher_failed")

    def _tick(self) -> None:
        """Spend the budget, take delivery reports, count overdue chunks, and replace a producer that failed."""
        now = self._clock()
        self._spend_budget(now)
        self._producer.poll(0)
        while self._due and self._due[0][0] <= now:
            _, number = self._due.popleft()
            if number in self._in_flight:
                self._record_failure(now, why="overdue")
        if self._is_fatal:
            self._abandon()
            self._producer = self._connect()
            self._is_fatal = False

    def _assemble(self, capture: _Capture) -> None:
        request = capture.request
        builder = self._builders.setdefault(request.id, ChunkBuilder(request, self._origin, self._transport))
        for step in capture.verify_steps:
            if full := builder.add(step):
                self._submit(full)
        if capture.finish:
            del self._builders[request.id]
            if rest := builder.end(capture.finish):
                self._submit(rest)

    def _submit(self, chunk: Chunk) -> None:
        if self._budget is None:
            self._send(chunk)
        else:
            self._budget.push(chunk, chunk_bytes(chunk), self._clock())

    def _spend_budget(self, now: float) -> None:
        """Send the chunks that the budget affords, and the ones that it will not without their features."""
        if self._budget is None:
            return
        while chunk := self._budget.pop(now):
            self._send(chunk)
        for chunk in self._budget.evict(now):
            self._send_without_features(chunk)

    def _send_without_features(self, chunk: Chunk) -> None:
        stripped = strip_features(chunk)
        freed = sum(step.features.nbytes for step in chunk.verify_steps)
        self._accounting.drop_features(len(chunk.verify_steps), freed)
        self._send(stripped)

    def _send(self, chunk: Chunk) -> None:
        delivery, now = Delivery.create(chunk), self._clock()
        if self._ending.is_set() and now >= self._close_by:
            self._drop(delivery, "closed")
        elif not self._breaker.allows(now):
            self._drop(delivery, "circuit_breaker_open")
        elif isinstance(encoded := self._encode(chunk), str):
            self._drop(delivery, encoded)
        else:
            self._produce(*encoded, delivery, now)

    def _encode(self, chunk: Chunk) -> tuple[Chunk, bytes] | DropReason:
        """Return the chunk as published and its bytes, or the reason to drop it."""
        try:
            has_features = chunk.envelope.features != "dropped"
            published = self._offload.offload(chunk) if self._offload and has_features else chunk
            return (published, encode(published)) if published else "offload_failed"
        except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
            log.warning("trace_chunk_unencodable", request=chunk.envelope.request, error=str(error))
            return "unencodable"

    def _produce(self, chunk: Chunk, value: bytes, delivery: Delivery, now: float) -> None:
        self._sequence += 1
        number = self._sequence
        self._in_flight[number] = delivery
        key, headers = delivery.request.encode(), message_headers(chunk, delivery.context)
        on_delivery = partial(self._on_delivery, number)
        try:
            self._producer.produce(
                self._kafka.traces_topic, value=value, key=key, headers=headers, on_delivery=on_delivery
            )
        except BufferError:
            self._settle(number, "queue_full")
        except KafkaException as error:
            self._on_delivery(number, error.args[0], None)
        else:
            self._due.append((now + OVERDUE_S, number))
            if self._budget is not None:
                claim = chunk.envelope.claim
                size = message_bytes(value, key, headers) + (claim.size if claim else 0)
                self._accounting.exceed_budget(self._budget.pay(size))

    def _on_delivery(self, number: int, error: KafkaError | None, _message: Message | None) -> None:
        """Take the delivery report of one chunk."""
        if error is None:
            if self._breaker.state != "closed":
                log.info("trace_circuit_breaker_closed")
            self._breaker.record_success()
            self._is_denied = False
            self._settle(number, None)
        elif error.code() in _TOO_LARGE:
            log.warning("trace_chunk_too_large", setting="kafka.max_message_bytes", error=error.str())
            self._settle(number, "too_large")
        elif error.code() in _UNKNOWN_FATE or error.fatal():
            self._settle(number, "unconfirmed")
        else:
            self._settle(number, "rejected")
            self._record_failure(self._clock(), why=error.str())

    def _settle(self, number: int, reason: DropReason | None) -> None:
        """Count a chunk in flight as published, or as dropped for a reason."""
        delivery = self._in_flight.pop(number, None)
        if delivery is None:
            return
        if reason is None:
            self._accounting.publish(delivery.rows, delivery.size)
        else:
            self._drop(delivery, reason)
        if reason != "queue_full":  # such a chunk was never sent, and there may be many of them
            spans.record(delivery.span(self._kafka.traces_topic, reason))

    def _drop(self, delivery: Delivery, reason: DropReason) -> None:
        self._accounting.drop(delivery.rows, delivery.size, reason)

    def _record_failure(self, now: float, why: str) -> None:
        before = self._breaker.state
        self._breaker.record_failure(now)
        if before == "closed" and self._breaker.state == "open":
            log.warning("trace_circuit_breaker_opened", bootstrap_servers=self._kafka.bootstrap_servers, why=why)

    def _on_error(self, error: KafkaError) -> None:
        """Handle an error of the whole client; it recovers by itself from all but fatal ones."""
        if error.fatal():
            log.error("trace_producer_failed", error=error.str())
            self._is_fatal = True
        elif error.code() in _ACCESS_DENIED and not self._is_denied:
            log.error("trace_producer_denied", why=error.str(), setting="kafka.client_options")
            self._is_denied = True

    def _drain(self) -> None:
        """Send the remaining rows, and settle every chunk, within the timeout of ``close``."""
        for builder in self._builders.values():
            if rest := builder.end(None):
                self._submit(rest)
        self._builders.clear()
        self._spend_budget(self._clock())
        for chunk in self._budget.clear() if self._budget else ():
            self._send_without_features(chunk)
        # An unreachable broker is unlikely to return within this time.
        timeout = max(0.0, self._close_by - self._clock())
        self._producer.flush(timeout if self._breaker.state == "closed" else min(timeout, 1.0))
        self._abandon()

    def _abandon(self) -> None:
        """Drop the chunks in flight; their delivery can no longer be confirmed."""
        self._producer.purge()
        self._producer.flush(1.0)
        for number in list(self._in_flight):
            self._settle(number, "unconfirmed")
