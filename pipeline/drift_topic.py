"""Events of drift on their topic, sent without waiting: the stream goes on whether the broker takes them or not."""

from __future__ import annotations

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from pipeline.broker import client
from schemas.events import DriftEvent
from schemas.settings import Kafka, SettingsError

log = structlog.get_logger()

GIVEN_UP_S = 300
"""For how long an event is sent again to a broker that does not take it."""
WAITING = 1_000
"""Events that wait for the broker at most."""


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
            raise SettingsError(f"kafka.bootstrap or kafka.client: {error}") from error

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
