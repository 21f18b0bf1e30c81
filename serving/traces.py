"""The trace publisher: takes rounds from the engine's thread, and brings them to Kafka from a thread of its own.

Every row ends in exactly one of three ways: *published* (the broker acknowledged it), *shed* (given up, with a reason),
or, while the node runs, *pending*. Bytes that are pending are bounded; beyond the bound the newest rows are shed.

**What is exact.** The producer is idempotent and never gives up on a chunk while the node runs: a message that timed
out in flight may have reached the broker all the same, and could be counted neither as published nor as shed. So a
broker that is away makes chunks wait, not fail. A chunk without an acknowledgement for ``OVERDUE_S`` counts as a failed
delivery for the breaker, and only for the breaker: it stays pending, and when the broker is back it arrives, once.
While the breaker is open new chunks are shed before they are sent, which is exact; one is sent as a probe every
``breaker_probe_s``. Only where the producer ends with chunks in hand (the node closes, or the client library reports a
fatal error) can the truth not be known: those rows are shed as ``unconfirmed``, and at most those may be in the topic
although they are counted as shed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import pyarrow as pa
import structlog
from confluent_kafka import KafkaError, KafkaException, Message
from confluent_kafka import Producer as ConfluentProducer
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from schemas.settings import Kafka, SettingsError, Traces
from schemas.trace import CONTENT_TYPE, Chunk, Round, encode, fingerprint
from serving.breaker import Breaker
from serving.chunks import FRAME_BYTES, Assembly, Origin, cut, row_bytes
from serving.engine import Finish, Request
from serving.ledger import Ledger, Reason, TraceCounts

log = structlog.get_logger()

OVERDUE_S = 10.0
"""A chunk that was not acknowledged for this long counts as a failed delivery."""

_IDLE_S = 0.05
_BREAKER_LEVEL = {"closed": 0, "half_open": 1, "open": 2}
_TOO_LARGE = (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE)
_UNKNOWN_FATE = (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT, KafkaError._FATAL, KafkaError._MSG_TIMED_OUT)


Headers = list[tuple[str, str | bytes | None]]


class Producer(Protocol):
    """The part of confluent-kafka's producer that is used here."""

    def produce(
        self,
        topic: str,
        *,
        value: bytes,
        key: bytes,
        headers: Headers,
        on_delivery: Callable[[KafkaError | None, Message], None],
    ) -> None:
        """Queue a message; ``on_delivery`` is called from ``poll`` or ``flush``."""

    def poll(self, timeout: float) -> int:
        """Run the delivery reports that wait."""

    def flush(self, timeout: float) -> int:
        """Wait until nothing is outstanding; returns what still is."""

    def purge(self) -> None:
        """Give up everything outstanding; reports follow."""


@dataclass(frozen=True, slots=True)
class _Item:
    """What the engine handed over; no rounds where only the end of a request is told."""

    request: Request
    rounds: tuple[Round, ...]
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class _Parcel:
    """A chunk in the producer's hands."""

    rows: int
    size: int


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
        self._limit = traces.queue_bytes
        self._budget = kafka.max_message_bytes - FRAME_BYTES
        self._clock = clock
        self._connect = partial(producer or connect, kafka, traces, self._on_error)
        self._producer = self._connect()
        self._breaker = Breaker(traces.breaker_after, traces.breaker_probe_s)
        self._ledger = Ledger()
        self._intake: SimpleQueue[_Item | None] = SimpleQueue()
        self._intake_lock = threading.Lock()
        self._closed = False
        self._origin = Origin("", "", "")
        self._open: dict[str, Assembly] = {}
        self._in_hand: dict[int, _Parcel] = {}
        self._due: deque[tuple[float, int]] = deque()
        self._tickets = 0
        self._fatal = False
        self._close_by = 0.0
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)

    def start(self, origin: Origin) -> None:
        """Begin to publish; ``origin`` stands in every chunk."""
        self._origin = origin
        self._thread.start()

    def record(self, request: Request, rounds: tuple[Round, ...], finish: Finish | None) -> None:
        """Take the next rounds of a request. Never blocks, never raises."""
        if not request.trace:
            return
        try:
            rows = tuple(part for r in rounds for part in cut(r, self._budget))
            size = sum(map(row_bytes, rows))
        except Exception:
            # The engine's thread must survive whatever a malformed round can raise.
            log.exception("trace_round_malformed", request=request.id)
            self._ledger.turn_away(len(rounds), "unencodable")
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
            self._intake.put(None)
        self._thread.join()
        return self.counts()

    def collect(self) -> Iterator[Metric]:
        """Metrics, read from the same counters at scrape time."""
        counts = self.counts()
        yield CounterMetricFamily("aurora_serve_trace_rows_captured", "Rounds handed over.", value=counts.captured)
        yield CounterMetricFamily("aurora_serve_trace_rows_published", "Rounds acknowledged.", value=counts.published)
        shed = CounterMetricFamily("aurora_serve_trace_rows_shed", "Rounds given up, by reason.", labels=["reason"])
        for reason, rows in counts.shed.items():
            shed.add_metric([reason], rows)
        yield shed
        yield GaugeMetricFamily("aurora_serve_trace_rows_pending", "Rounds on their way.", value=counts.pending)
        yield GaugeMetricFamily("aurora_serve_trace_queue_bytes", "Bytes on their way.", value=counts.pending_bytes)
        level = _BREAKER_LEVEL[self._breaker.state]
        yield GaugeMetricFamily("aurora_serve_trace_breaker", "0 closed, 1 half open, 2 open.", value=level)

    def _run(self) -> None:
        while not self._step():
            pass
        self._drain()

    def _step(self) -> bool:
        """Publish what comes next; True when there is nothing more to come."""
        try:
            with suppress(Empty):
                item = self._intake.get(timeout=_IDLE_S)
                if item is None:
                    return True
                self._assemble(item)
            self._tend()
        except Exception:
            # This thread may not die of a fault nobody foresaw: all later traces of the node would be lost.
            log.exception("trace_publisher_fault")
        return False

    def _tend(self) -> None:
        """What has to happen between two chunks: delivery reports, overdue chunks, a producer that broke."""
        self._producer.poll(0)
        now = self._clock()
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
        assembly = self._open.setdefault(request.id, Assembly(request, self._origin, self._budget))
        for r in item.rounds:
            if full := assembly.add(r):
                self._send(full)
        if item.finish:
            del self._open[request.id]
            if rest := assembly.end(item.finish):
                self._send(rest)

    def _send(self, chunk: Chunk) -> None:
        parcel = _Parcel(len(chunk.rounds), sum(map(row_bytes, chunk.rounds)))
        now = self._clock()
        if not self._breaker.admits(now):
            self._shed(parcel, "breaker_open")
            return
        try:
            value = encode(chunk)
        except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
            log.warning("trace_chunk_unencodable", request=chunk.envelope.request, error=str(error))
            self._shed(parcel, "unencodable")
            return
        self._tickets += 1
        ticket = self._tickets
        self._in_hand[ticket] = parcel
        try:
            self._producer.produce(
                self._kafka.traces_topic,
                value=value,
                key=chunk.envelope.request.encode(),
                headers=_headers(chunk),
                on_delivery=partial(self._reported, ticket),
            )
        except BufferError:
            self._settle(ticket, "queue_full")
        except KafkaException as error:
            self._reported(ticket, error.args[0], None)
        else:
            self._due.append((now + OVERDUE_S, ticket))

    def _reported(self, ticket: int, error: KafkaError | None, _message: Message | None) -> None:
        """The delivery report of one chunk."""
        if error is None:
            if self._breaker.state != "closed":
                log.info("trace_breaker_closed")
            self._breaker.succeeded()
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

    def _shed(self, parcel: _Parcel, reason: Reason) -> None:
        self._ledger.shed(parcel.rows, parcel.size, reason)

    def _failed(self, now: float, why: str) -> None:
        before = self._breaker.state
        self._breaker.failed(now)
        if before == "closed" and self._breaker.state == "open":
            log.warning("trace_breaker_opened", bootstrap=self._kafka.bootstrap, why=why)

    def _on_error(self, error: KafkaError) -> None:
        """Errors of the client as a whole; only fatal ones matter, from the others it recovers by itself."""
        if error.fatal():
            log.error("trace_producer_fatal", error=error.str())
            self._fatal = True

    def _drain(self) -> None:
        """Send what is assembled and queued, and settle every chunk, within the time that ``close`` gave."""
        for assembly in self._open.values():
            if rest := assembly.end(None):
                self._send(rest)
        self._open.clear()
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


def connect(kafka: Kafka, traces: Traces, on_error: Callable[[KafkaError], None]) -> Producer:
    """An idempotent producer that keeps trying for as long as it lives.

    Raises:
        SettingsError: an option in ``kafka.client`` that the client does not know.
    """
    ours: dict[str, Any] = {
        "bootstrap.servers": kafka.bootstrap,
        "enable.idempotence": True,
        "acks": "all",
        "message.timeout.ms": 0,
        "message.max.bytes": kafka.max_message_bytes,
        "queue.buffering.max.kbytes": max(1, traces.queue_bytes // 1024),
        "linger.ms": 20,
        "compression.type": "none",
        "reconnect.backoff.max.ms": 2000,
        "error_cb": on_error,
        "logger": logging.getLogger("librdkafka"),
    }
    try:
        return ConfluentProducer({**kafka.client, **ours})
    except (KafkaException, ValueError) as error:
        raise SettingsError(f"kafka.bootstrap or kafka.client: {error}") from error


def _headers(chunk: Chunk) -> Headers:
    drafted = [r.speculator for r in chunk.rounds if r.speculator]
    fields = {
        "content-type": CONTENT_TYPE,
        "schema": fingerprint(),
        "node": chunk.envelope.node,
        "target": chunk.envelope.target,
        "speculator": drafted[-1] if drafted else "",
        "rows": str(len(chunk.rounds)),
    }
    return [(name, text.encode()) for name, text in fields.items()]
