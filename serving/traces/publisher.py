"""The trace publisher: takes verify steps from the engine's thread, and brings them to Kafka from a thread of its own.

Every row ends in exactly one of three ways: *published* (the broker acknowledged it), *shed* (given up, with a reason),
or, while the node runs, *pending*. Bytes that are pending are bounded; beyond the bound the newest rows are shed.

**What is exact.** The producer is idempotent and never gives up on a chunk while the node runs: a message that timed
out in flight may have reached the broker all the same, and could be counted neither as published nor as shed. So a
broker that is away makes chunks wait, not fail. A chunk without an acknowledgement for ``OVERDUE_S`` counts as a failed
delivery for the breaker, and only for the breaker: it stays pending, and when the broker is back it arrives, once.
While the breaker is open new chunks are shed before they are sent, which is exact; one is sent as a probe every
``circuit_breaker_probe_interval``. Only where the producer ends with chunks in hand (the node closes, or the
client
library reports a
fatal error) can the truth not be known: those rows are shed as ``unconfirmed``, and at most those may be in the topic
although they are counted as shed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import pyarrow as pa
import structlog
from confluent_kafka import KafkaError, KafkaException, Message
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from schemas.claim_store import ClaimStore
from schemas.settings import Kafka, Traces
from schemas.telemetry import spans
from schemas.telemetry.spans import Span
from schemas.telemetry.trace_context import TraceContext, request_context
from schemas.trace.record import Chunk, VerifyStep, encode
from serving.engines.base import Finish, Request
from serving.traces.accounting import Ledger, Reason, TraceCounts
from serving.traces.chunks import (
    FRAME_BYTES,
    Assembly,
    Origin,
    Space,
    Way,
    chunk_bytes,
    cut,
    row_bytes,
    without_features,
)
from serving.traces.circuit_breaker import Breaker
from serving.traces.offload import Cloakroom
from serving.traces.producer import NOT_LET_IN, Producer, connect, headers_of, message_bytes
from serving.traces.sampling import BURST_S, TokenBucket, WaitingRoom, is_sampled

log = structlog.get_logger()

OVERDUE_S = 10.0
"""A chunk that was not acknowledged for this long counts as a failed delivery."""

_PAUSE_S = 0.05
"""The publisher looks for verify steps this often. Woken for each, it would take the interpreter from the engine's
thread
just when that one has work for the processor."""
_BREAKER_LEVEL = {"closed": 0, "half_open": 1, "open": 2}
_TOO_LARGE = (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE)
_UNKNOWN_FATE = (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT, KafkaError._FATAL, KafkaError._MSG_TIMED_OUT)


@dataclass(frozen=True, slots=True)
class _Item:
    """What the engine handed over; no verify steps where only the end of a request is told."""

    request: Request
    verify_steps: tuple[VerifyStep, ...]
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class _Parcel:
    """A chunk in the producer's hands."""

    rows: int
    size: int
    context: TraceContext
    """The span of its publication."""
    request: str
    number: int
    since: float
    """Unix time at which it was made ready."""


class TracePublisher:
    """A ``TraceSink`` that publishes to Kafka.

    Args:
        kafka: Broker, topic, and the size that no message exceeds.
        traces: Bounds and the breaker's figures.
        producer: Makes the producer; replaced by tests.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        kafka: Kafka,
        traces: Traces,
        producer: Callable[[Kafka, Traces, Callable[[KafkaError], None]], Producer] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kafka = kafka
        self._limit = traces.max_queue_bytes
        self._way = Way(traces.features, Space(kafka.max_message_bytes - FRAME_BYTES, traces.claim_check_max_bytes))
        self._clock = clock
        self._connect = partial(producer or connect, kafka, traces, self._on_error)
        self._producer = self._connect()
        self._breaker = Breaker(traces.circuit_breaker_failures, traces.circuit_breaker_probe_interval)
        self._ledger = Ledger()
        self._cloakroom = _cloakroom(traces, clock)
        self._room = _waiting_room(kafka, traces)
        self._share = traces.sample_ratio
        self._intake: SimpleQueue[_Item] = SimpleQueue()
        self._intake_lock = threading.Lock()
        self._closed = False
        self._ending = threading.Event()
        self._origin = Origin("", "", "")
        self._open: dict[str, Assembly] = {}
        self._in_hand: dict[int, _Parcel] = {}
        self._due: deque[tuple[float, int]] = deque()
        self._tickets = 0
        self._fatal = False
        self._refused = False
        self._close_by = 0.0
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)

    def start(self, origin: Origin) -> None:
        """Begin to publish; ``origin`` stands in every chunk."""
        self._origin = origin
        self._thread.start()

    def wants(self, request: str) -> bool:
        """Whether a request belongs to the share that is traced; to be asked once, those that do not are counted."""
        if is_sampled(request, self._share):
            return True
        self._ledger.sample_out()
        return False

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        """Take the next verify steps of a request. Never blocks, never raises."""
        if not request.trace:
            return
        try:
            kept = map(without_features, verify_steps) if self._way.features == "recompute" else verify_steps
            rows = tuple(part for r in kept for part in cut(r, self._way))
            size = sum(map(row_bytes, rows))
        except Exception:
            # The engine's thread must survive whatever a malformed verify step can raise.
            log.exception("trace_verify_step_malformed", request=request.id)
            self._ledger.turn_away(len(verify_steps), "unencodable")
            rows, size = (), 0
        with self._intake_lock:
            if self._closed:
                self._ledger.turn_away(len(rows), "closed")
                return
            if not self._ledger.capture(len(rows), size, self._limit):
                rows = ()
            if rows or finish:
                self._intake.put(_Item(request, rows, finish))

    def counts(self) -> TraceCounts:
        """Where the rows are."""
        return self._ledger.counts()

    @property
    def breaker(self) -> str:
        """State of the breaker: closed, open or half_open."""
        return self._breaker.state

    def close(self, timeout: float) -> TraceCounts:
        """Publish what waits, for at most ``timeout`` seconds; what is left is shed and counted."""
        with self._intake_lock:
            self._closed = True
            self._close_by = self._clock() + timeout
            self._ending.set()
        self._thread.join()
        return self.counts()

    def collect(self) -> Iterator[Metric]:
        """Metrics, read from the same counters at scrape time."""
        counts = self.counts()
        yield CounterMetricFamily(
            "aurora_serve_trace_rows_captured", "Verify steps handed over.", value=counts.captured
        )
        yield CounterMetricFamily(
            "aurora_serve_trace_rows_published", "Verify steps acknowledged.", value=counts.published
        )
        shed = CounterMetricFamily(
            "aurora_serve_trace_rows_shed", "Verify steps given up, by reason.", labels=["reason"]
        )
        for reason, rows in counts.shed.items():
            shed.add_metric([reason], rows)
        yield shed
        yield GaugeMetricFamily("aurora_serve_trace_rows_pending", "Verify steps on their way.", value=counts.pending)
        yield GaugeMetricFamily("aurora_serve_trace_queue_bytes", "Bytes on their way.", value=counts.pending_bytes)
        yield CounterMetricFamily(
            "aurora_serve_trace_requests_sampled_out", "Requests outside the traced share.", value=counts.sampled_out
        )
        level = _BREAKER_LEVEL[self._breaker.state]
        yield GaugeMetricFamily("aurora_serve_trace_breaker", "0 closed, 1 half open, 2 open.", value=level)
        level = _BREAKER_LEVEL[self._cloakroom.state if self._cloakroom else "closed"]
        yield GaugeMetricFamily("aurora_serve_trace_claim_breaker", "0 closed, 1 half open, 2 open.", value=level)

    def _run(self) -> None:
        ending = False
        while not ending:
            ending = self._ending.wait(_PAUSE_S)
            for _ in range(self._intake.qsize()):
                self._guarded(partial(self._assemble, self._intake.get()))
            self._guarded(self._tend)
        self._drain()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            # This thread may not die of a fault nobody foresaw: all later traces of the node would be lost.
            log.exception("trace_publisher_fault")

    def _tend(self) -> None:
        """What has to happen time and again: budget, delivery reports, overdue chunks, a producer that broke."""
        now = self._clock()
        self._spend(now)
        self._producer.poll(0)
        while self._due and self._due[0][0] <= now:
            _, ticket = self._due.popleft()
            if ticket in self._in_hand:
                self._failed(now, why="overdue")
        if self._fatal:
            self._give_up()
            self._producer = self._connect()
            self._fatal = False

    def _assemble(self, item: _Item) -> None:
        request = item.request
        assembly = self._open.setdefault(request.id, Assembly(request, self._origin, self._way))
        for r in item.verify_steps:
            if full := assembly.add(r):
                self._offer(full)
        if item.finish:
            del self._open[request.id]
            if rest := assembly.end(item.finish):
                self._offer(rest)

    def _offer(self, chunk: Chunk) -> None:
        if self._room is None:
            self._send(chunk)
        else:
            self._room.enter(chunk, chunk_bytes(chunk), self._clock())

    def _spend(self, now: float) -> None:
        """Send what the budget can pay, and give up what it will not."""
        if self._room is None:
            return
        while chunk := self._room.next(now):
            self._send(chunk)
        for chunk in self._room.expel(now):
            self._shed(_parcel(chunk), "budget")

    def _send(self, chunk: Chunk) -> None:
        parcel, now = _parcel(chunk), self._clock()
        if self._ending.is_set() and now >= self._close_by:
            self._shed(parcel, "closed")
        elif not self._breaker.admits(now):
            self._shed(parcel, "breaker_open")
        elif isinstance(packed := self._pack(chunk), str):
            self._shed(parcel, packed)
        else:
            self._tickets += 1
            self._in_hand[self._tickets] = parcel
            self._produce(*packed, parcel.context, self._tickets, now)

    def _pack(self, chunk: Chunk) -> tuple[Chunk, bytes] | Reason:
        """The chunk as it travels and its bytes, or why there are none."""
        try:
            checked_in = self._cloakroom.check_in(chunk) if self._cloakroom else chunk
            return (checked_in, encode(checked_in)) if checked_in else "claim_failed"
        except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
            log.warning("trace_chunk_unencodable", request=chunk.envelope.request, error=str(error))
            return "unencodable"

    def _produce(self, chunk: Chunk, value: bytes, context: TraceContext, ticket: int, now: float) -> None:
        key, headers = chunk.envelope.request.encode(), headers_of(chunk, context)
        report = partial(self._reported, ticket)
        try:
            self._producer.produce(self._kafka.traces_topic, value=value, key=key, headers=headers, on_delivery=report)
        except BufferError:
            self._settle(ticket, "queue_full")
        except KafkaException as error:
            self._reported(ticket, error.args[0], None)
        else:
            self._due.append((now + OVERDUE_S, ticket))
            if self._room is not None:
                claim = chunk.envelope.claim
                self._room.pay(message_bytes(value, key, headers) + (claim.size if claim else 0))

    def _reported(self, ticket: int, error: KafkaError | None, _message: Message | None) -> None:
        """The delivery report of one chunk."""
        if error is None:
            if self._breaker.state != "closed":
                log.info("trace_breaker_closed")
            self._breaker.succeeded()
            self._refused = False
            self._settle(ticket, None)
        elif error.code() in _TOO_LARGE:
            log.warning("trace_chunk_too_large", setting="kafka.max_message_bytes", error=error.str())
            self._settle(ticket, "too_large")
        elif error.code() in _UNKNOWN_FATE or error.fatal():
            self._settle(ticket, "unconfirmed")
        else:
            self._settle(ticket, "refused")
            self._failed(self._clock(), why=error.str())

    def _settle(self, ticket: int, reason: Reason | None) -> None:
        parcel = self._in_hand.pop(ticket, None)
        if parcel is None:
            return
        if reason is None:
            self._ledger.publish(parcel.rows, parcel.size)
        else:
            self._shed(parcel, reason)
        if reason != "queue_full":  # such a chunk was never sent, and there may be many of them
            spans.record(_send_span(self._kafka.traces_topic, parcel, reason))

    def _shed(self, parcel: _Parcel, reason: Reason) -> None:
        self._ledger.shed(parcel.rows, parcel.size, reason)

    def _failed(self, now: float, why: str) -> None:
        before = self._breaker.state
        self._breaker.failed(now)
        if before == "closed" and self._breaker.state == "open":
            log.warning("trace_breaker_opened", bootstrap=self._kafka.bootstrap_servers, why=why)

    def _on_error(self, error: KafkaError) -> None:
        """Errors of the client as a whole: it recovers by itself from all but the fatal ones."""
        if error.fatal():
            log.error("trace_producer_fatal", error=error.str())
            self._fatal = True
        elif error.code() in NOT_LET_IN and not self._refused:
            log.error("trace_producer_not_let_in", why=error.str(), setting="kafka.client_options")
            self._refused = True

    def _drain(self) -> None:
        """Send what is assembled and queued, and settle every chunk, within the time that ``close`` gave."""
        for assembly in self._open.values():
            if rest := assembly.end(None):
                self._offer(rest)
        self._open.clear()
        self._spend(self._clock())
        for chunk in self._room.clear() if self._room else ():
            self._shed(_parcel(chunk), "budget")
        # A broker that is away will not come back for the sake of this node's end.
        patience = max(0.0, self._close_by - self._clock())
        self._producer.flush(patience if self._breaker.state == "closed" else min(patience, 1.0))
        self._give_up()

    def _give_up(self) -> None:
        """Nobody will ever say what became of the chunks in hand."""
        self._producer.purge()
        self._producer.flush(1.0)
        for ticket in list(self._in_hand):
            self._settle(ticket, "unconfirmed")


def _parcel(chunk: Chunk) -> _Parcel:
    request = chunk.envelope.request
    return _Parcel(
        rows=len(chunk.verify_steps),
        size=sum(map(row_bytes, chunk.verify_steps)),
        context=request_context(request).child(),
        request=request,
        number=chunk.envelope.chunk,
        since=time.time(),
    )


def _send_span(topic: str, parcel: _Parcel, error_type: Reason | None) -> Span:
    """Return the span of a chunk that the broker has just acknowledged, or that failed."""
    return Span(
        name=f"send {topic}",
        event="chunk_published" if error_type is None else "chunk_dropped",
        context=parcel.context,
        start=parcel.since,
        end=time.time(),
        parent=request_context(parcel.request).span_id,
        kind="producer",
        error_type=error_type,
        attributes={
            "messaging.system": "kafka",
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
            "messaging.destination.name": topic,
            "messaging.kafka.message.key": parcel.request,
            "messaging.message.body.size": parcel.size,
            "request": parcel.request,
            "chunk": parcel.number,
            "rows": parcel.rows,
        },
    )


def _waiting_room(kafka: Kafka, traces: Traces) -> WaitingRoom | None:
    """Where chunks wait for the budget, if there is one.

    Half of the queue: the other half is for what comes in, or all rows that come would be shed whatever they teach.
    """
    if not traces.max_bytes_per_second:
        return None
    largest = kafka.max_message_bytes + (traces.claim_check_max_bytes if traces.features == "claim-check" else 0)
    burst = max(traces.max_bytes_per_second * BURST_S, largest)
    return WaitingRoom(TokenBucket(traces.max_bytes_per_second, burst), traces.max_queue_bytes // 2)


def _cloakroom(traces: Traces, clock: Callable[[], float]) -> Cloakroom | None:
    if traces.features != "claim-check":
        return None
    return Cloakroom(
        ClaimStore(traces), Breaker(traces.circuit_breaker_failures, traces.circuit_breaker_probe_interval), clock
    )
