"""Events of drift on their topic: sent without waiting, as the stream goes on whether the broker takes them or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.cimpl import OFFSET_BEGINNING
from pydantic import ValidationError

from pipeline.kafka_admin import TIMEOUT_S, TopicError, client, connect
from schemas.events import DriftEvent
from schemas.settings import Kafka, SettingsError

log = structlog.get_logger()

GIVEN_UP_S = 300
"""For how long an event is sent again to a broker that does not take it."""
WAITING = 1_000
"""Events that wait for the broker at most."""


POLL_S = 0.5


class DriftTopic:
    """Sends events; what is not taken within ``GIVEN_UP_S`` is counted and logged. Not thread-safe."""

    def __init__(self, settings: Kafka) -> None:
        """Make the producer; nothing is connected yet.

        Raises:
            SettingsError: an option that the Kafka client does not know.
        """
        self.unsent = 0
        """Events that were given up."""
        self._topic = settings.drift_topic
        options = {
            "enable.idempotence": True,
            "message.timeout.ms": GIVEN_UP_S * 1000,
            "queue.buffering.max.messages": WAITING,
        }
        try:
            self._producer = Producer(client(settings, **options))
        except (KafkaException, ValueError) as error:
            raise SettingsError(f"kafka.bootstrap_servers or kafka.client_options: {error}") from error

    def send(self, event: DriftEvent) -> None:
        """Hand one to the producer."""
        try:
            self._producer.produce(
                self._topic, event.model_dump_json().encode(), key=event.key, on_delivery=self._delivered
            )
        except (BufferError, KafkaException) as error:
            self._give_up(str(error))

    def poll(self) -> None:
        """Look what became of those that were sent."""
        self._producer.poll(0)

    def _delivered(self, error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            self._give_up(error.str())

    def _give_up(self, why: str) -> None:
        self.unsent += 1
        log.error("drift_event_not_sent", topic=self._topic, setting="kafka.drift_topic", why=why)


def read(settings: Kafka) -> Iterator[DriftEvent | None]:
    """Events that the topic holds and those that come, each once; None whenever all there are were read.

    Raises:
        TopicError: the broker does not answer, or has no such topic.
        SettingsError: an option that the Kafka client does not know.
    """
    topic = settings.drift_topic
    found = connect(settings).list_topics(topic, timeout=TIMEOUT_S).topics[topic]
    if found.error is not None:
        raise TopicError(
            f"topic {topic} at {settings.bootstrap_servers}: {found.error.str()}; a stream worker makes it, or "
            f"`aurora topics apply`; check kafka.drift_topic"
        )
    options = {"group.id": "aurora-drift-readers", "enable.auto.commit": False, "enable.partition.eof": True}
    # A reader of its own place: no group is joined by assigning, and no offset is committed.
    with closing(Consumer(client(settings, **options))) as consumer:
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in found.partitions])
        yield from _once(consumer, set(found.partitions))


def _once(consumer: Consumer, unread: set[int]) -> Iterator[DriftEvent | None]:
    known: set[str] = set()
    while True:
        message = consumer.poll(POLL_S)
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
        elif (event := _event(message)) is not None and event.id not in known:
            known.add(event.id)
            yield event


def _event(message: Message) -> DriftEvent | None:
    try:
        return DriftEvent.model_validate_json(message.value() or b"")
    except ValidationError as error:
        log.warning("not_a_drift_event", partition=message.partition(), offset=message.offset(), why=str(error))
        return None
