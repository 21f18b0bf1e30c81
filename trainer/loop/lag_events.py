"""Events about the trainer's lag on a Kafka topic, so that the nodes publish fewer requests while it is behind.

A trainer that keeps up sends nothing and has no connection. Nothing here waits for the broker or fails the training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from prometheus_client import Counter

from schemas.events import TrainerLag
from schemas.settings import Kafka, SettingsError

log = structlog.get_logger()

INTERVAL_S = 10.0
"""Interval at which an event is repeated while the trainer is behind."""
VALID_S = 120.0
"""Validity of an event: longer than an evaluation, during which the trainer sends none."""
_CLOSE_S = 1.0


class LagEvents:
    """The events of one trainer.

    Args:
        kafka: Broker and topic.
        line: The trainer's line.
        dropped: Counts the events that the broker did not take.
        connect: Creates the producer; replaced by tests.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        kafka: Kafka,
        line: str,
        dropped: Counter,
        connect: Callable[[Kafka], Producer] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kafka, self._line = kafka, line
        self._connect, self._clock = connect or _connect, clock
        self._producer: Producer | None = None
        self._sent: float | None = None
        """Share of the last event, where it was below 1."""
        self._send_at = 0.0
        self._dropped = dropped

    def update(self, lag_s: float, share: float) -> None:
        """Send an event if the share changed, or if the last one is to be repeated.

        Raises:
            SettingsError: ``kafka.client_options`` has an option that the client does not know.
        """
        if self._producer is not None:
            self._producer.poll(0)
        is_behind = share < 1
        if not is_behind and self._sent is None:
            return
        if share == self._sent and self._clock() < self._send_at:
            return
        self._producer = self._producer or self._connect(self._kafka)
        event = TrainerLag(time=datetime.now(UTC), line=self._line, lag_s=lag_s, share=share, valid_s=VALID_S)
        try:
            self._producer.produce(
                self._kafka.lag_topic, event.model_dump_json().encode(), key=event.key, on_delivery=self._on_delivery
            )
        except (BufferError, KafkaException) as error:
            self._drop(str(error))
        self._sent = share if is_behind else None
        self._send_at = self._clock() + INTERVAL_S

    def close(self) -> None:
        """Wait a little for the last event."""
        if self._producer is not None:
            self._producer.flush(_CLOSE_S)

    def _on_delivery(self, error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            self._drop(error.str())

    def _drop(self, why: str) -> None:
        self._dropped.inc()
        log.warning("lag_event_dropped", topic=self._kafka.lag_topic, setting="kafka.lag_topic", error=why)


def _connect(kafka: Kafka) -> Producer:
    options = {
        "bootstrap.servers": kafka.bootstrap_servers,
        # An event that arrives later says nothing about the lag of that time.
        "message.timeout.ms": round(VALID_S / 2 * 1000),
        "reconnect.backoff.max.ms": 2000,
        "log_level": 0,
    }
    try:
        return Producer({**kafka.client_options, **options})
    except (KafkaException, ValueError) as error:
        raise SettingsError(f"kafka.bootstrap_servers or kafka.client_options: {error}") from error
