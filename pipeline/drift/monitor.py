"""Drift monitoring in a stream worker: a detector for each partition, and the drift events on their Kafka topic.

Nothing here stops a record. After a failure the state of a partition is unknown, and the next commit rebuilds it. An
event that the broker does not accept is counted and logged. Events are delivered at least once: after a restart the
events of the newest ``RESEND_RECORDS`` records are sent again, equal to the first ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field

import pyarrow as pa
import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.cimpl import OFFSET_BEGINNING
from pydantic import ValidationError

from pipeline.broker import TIMEOUT_S, TopicError, client_config, connect
from pipeline.delta import DeltaLog
from pipeline.drift.detector import (
    TRACE_COLUMNS,
    PartitionDetector,
    TrafficKey,
    find_replay_start,
    observe_requests,
)
from pipeline.offsets import SourcePartition
from schemas.events import AcceptanceStats, DriftEvent
from schemas.settings import Drift, Kafka, SettingsError
from schemas.status import DriftStatus, TrafficStatus

log = structlog.get_logger()

RESEND_RECORDS = 1_000
"""Records before the first one of a worker whose events it sends again: more than a commit contains."""
NEWEST_EVENTS = 10
"""Events in the worker's status."""
SHOWN_TRAFFIC = 50
"""Versions and labels in status and metrics, those with the most requests: clients choose the labels."""
DELIVERY_TIMEOUT_S = 300
"""Time for which the producer retries an event."""
CLOSE_TIMEOUT_S = 5
"""Time for which a worker that ends waits for its events to be delivered."""
MAX_QUEUED_EVENTS = 1_000
"""Events that wait for the broker at most."""
_POLL_S = 0.5


class DriftEventProducer:
    """Sends events without waiting. Events not delivered within ``DELIVERY_TIMEOUT_S`` are counted and logged.

    Not thread-safe.
    """

    def __init__(self, settings: Kafka) -> None:
        """Create the producer. It connects when it sends.

        Raises:
            SettingsError: the Kafka client does not know an option.
        """
        self.dropped = 0
        """Events that were not delivered."""
        self._topic = settings.drift_topic
        options = {
            "enable.idempotence": True,
            "message.timeout.ms": DELIVERY_TIMEOUT_S * 1000,
            "queue.buffering.max.messages": MAX_QUEUED_EVENTS,
        }
        try:
            self._producer = Producer(client_config(settings, **options))
        except (KafkaException, ValueError) as error:
            raise SettingsError(f"kafka.bootstrap_servers or kafka.client_options: {error}") from error

    def send(self, event: DriftEvent) -> None:
        """Queue an event."""
        try:
            self._producer.produce(
                self._topic, event.model_dump_json().encode(), key=event.key, on_delivery=self._on_delivery
            )
        except (BufferError, KafkaException) as error:
            self._drop(str(error))

    def poll(self) -> None:
        """Process the delivery reports of sent events."""
        self._producer.poll(0)

    def close(self) -> None:
        """Wait for the events to be delivered, for a short time: the next worker sends the newest again."""
        self._producer.flush(CLOSE_TIMEOUT_S)

    def _on_delivery(self, error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            self._drop(error.str())

    def _drop(self, why: str) -> None:
        self.dropped += 1
        log.error("drift_event_dropped", topic=self._topic, setting="kafka.drift_topic", why=why)


@dataclass
class _MonitoredPartition:
    """A detector that has observed all records before ``next_offset``."""

    detector: PartitionDetector
    next_offset: int
    means: Mapping[TrafficKey, AcceptanceStats] = field(default_factory=dict)


class DriftMonitor:
    """Monitors the partitions of a worker. One thread observes; another thread may call ``status``."""

    def __init__(self, settings: Drift, tables: DeltaLog, events: DriftEventProducer) -> None:
        self._settings = settings
        self._tables = tables
        self._events = events
        self._partitions: dict[SourcePartition, _MonitoredPartition] = {}
        self._newest: dict[str, DriftEvent] = {}
        self._detected = self._failed = 0

    def observe(self, source: SourcePartition, offsets: range, verify_steps: pa.Table) -> None:
        """Observe committed rows of ``traces``, built from these offsets of a partition."""
        partition = self._partitions.get(source)
        try:
            if partition is None or partition.next_offset != offsets.start:
                partition = self._rebuild(source, offsets.start)
            for event in _detect(partition.detector, verify_steps):
                self._send(event)
            partition.means = partition.detector.means()
            self._events.poll()
            partition.next_offset = offsets.stop
            self._partitions[source] = partition
        except Exception as error:  # noqa: BLE001 - drift is a by-product: its errors must not keep records from the tables
            self._failed += 1
            self._partitions.pop(source, None)
            log.warning("drift_observation_failed", partition=source.partition, why=repr(error))

    def retain(self, sources: Iterable[SourcePartition]) -> None:
        """Drop the state of all other partitions."""
        retained = set(sources)
        self._partitions = {source: state for source, state in self._partitions.items() if source in retained}

    def close(self) -> None:
        """Wait for the events to be delivered."""
        self._events.close()

    def status(self) -> DriftStatus:
        """Return the newest events, and the acceptance of each version and label over all partitions."""
        stats: dict[TrafficKey, list[AcceptanceStats]] = {}
        for partition in list(self._partitions.values()):
            for key, mean in partition.means.items():
                stats.setdefault(key, []).append(mean)
        traffic = [TrafficStatus(**key._asdict(), acceptance=_combine(parts)) for key, parts in stats.items()]
        traffic.sort(key=lambda shown: -shown.acceptance.requests)
        return DriftStatus(
            detected=self._detected,
            dropped=self._events.dropped,
            failed=self._failed,
            newest=list(self._newest.values()),
            traffic=traffic[:SHOWN_TRAFFIC],
        )

    def _rebuild(self, source: SourcePartition, offset: int) -> _MonitoredPartition:
        """Rebuild the state before an offset from the table. Send the events again that may not have been sent."""
        resend_from = max(0, offset - RESEND_RECORDS)
        start = find_replay_start(resend_from, self._settings.window_records)
        detector = PartitionDetector(source, self._settings)
        if start < offset:
            rows = self._tables.read_offsets("traces", source, range(start, offset), TRACE_COLUMNS)
            for event in _detect(detector, rows):
                if event.offset >= resend_from:
                    self._send(event)
        return _MonitoredPartition(detector, offset)

    def _send(self, event: DriftEvent) -> None:
        if event.id not in self._newest:
            self._detected += 1
            log.warning("drift_detected", **event.model_dump(mode="json"))
            self._newest = dict([*self._newest.items(), (event.id, event)][-NEWEST_EVENTS:])
        self._events.send(event)


def read_events(settings: Kafka) -> Iterator[DriftEvent | None]:
    """Yield the events on the topic, each once, and then new ones; None whenever all existing events were read.

    Raises:
        TopicError: the broker does not answer, or has no such topic.
        SettingsError: the Kafka client does not know an option.
    """
    topic = settings.drift_topic
    found = connect(settings).list_topics(topic, timeout=TIMEOUT_S).topics[topic]
    if found.error is not None:
        raise TopicError(
            f"topic {topic} at {settings.bootstrap_servers}: {found.error.str()}; a stream worker creates it, or "
            f"`aurora topics apply`; check kafka.drift_topic"
        )
    options = {"group.id": "aurora-drift-readers", "enable.auto.commit": False, "enable.partition.eof": True}
    # Assigning partitions joins no group, and no offset is committed.
    with closing(Consumer(client_config(settings, **options))) as consumer:
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in found.partitions])
        yield from _read_unique(consumer, set(found.partitions))


def _read_unique(consumer: Consumer, unread: set[int]) -> Iterator[DriftEvent | None]:
    known: set[str] = set()
    while True:
        message = consumer.poll(_POLL_S)
        if message is None:
            if not unread:
                yield None
            continue
        error = message.error()
        if error is not None and error.code() == KafkaError._PARTITION_EOF:
            unread.discard(message.partition() or 0)
            if not unread:
                yield None
        elif error is not None:
            raise TopicError(
                f"topic {message.topic()}: {error.str()}; check kafka.bootstrap_servers and kafka.drift_topic"
            )
        elif (event := _parse_event(message)) is not None and event.id not in known:
            known.add(event.id)
            yield event


def _parse_event(message: Message) -> DriftEvent | None:
    try:
        return DriftEvent.model_validate_json(message.value() or b"")
    except ValidationError as error:
        log.warning("drift_event_invalid", partition=message.partition(), offset=message.offset(), why=str(error))
        return None


def _detect(detector: PartitionDetector, verify_steps: pa.Table) -> Iterator[DriftEvent]:
    for observation in observe_requests(verify_steps):
        event = detector.observe(observation)
        if event is not None:
            yield event


def _combine(parts: list[AcceptanceStats]) -> AcceptanceStats:
    """Return the mean over all requests of several partitions."""
    requests = sum(part.requests for part in parts)
    means = {
        name: sum(part.requests * getattr(part, name) for part in parts) / requests
        for name in ("first_token_acceptance", "acceptance_length", "draft_tokens")
    }
    return AcceptanceStats(requests=requests, **means)
