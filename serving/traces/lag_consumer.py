"""Follows the lag of the trainer on its topic: the share of the requests that a node publishes.

An event holds until the next one, at most for its validity. Without events, which is also the case without a broker, a
trainer or the topic, the node publishes all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import structlog
from confluent_kafka import Message
from pydantic import ValidationError

from schemas.events import TrainerLag
from schemas.settings import Kafka
from serving.topic_reader import TopicReader

log = structlog.get_logger()

MAX_VALID_S = 600.0
"""Longest validity of an event, whatever it says."""


class LagConsumer:
    """Reads the lag events of a line; events from before the start are not read.

    Args:
        kafka: Broker and topic.
        clock: Unix time in seconds, to recognize old events.
        elapsed: Monotonic seconds, for the validity of an event.

    Raises:
        SettingsError: ``kafka.client_options`` has an option that the client does not know.
    """

    def __init__(
        self,
        kafka: Kafka,
        clock: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._topic, self._clock, self._elapsed = kafka.lag_topic, clock, elapsed
        self._reader = TopicReader(kafka, self._topic, "lag", self._take_all)
        self._line = ""
        self._held: tuple[float, float] = (1.0, 0.0)
        """Share of the last event, and the time until which it holds."""

    @property
    def share(self) -> float:
        """Share of the requests to publish; from any thread."""
        share, until = self._held
        return share if self._elapsed() < until else 1.0

    def start(self, line: str) -> None:
        """Start to read the events of a line."""
        self._line = line
        self._reader.start()

    def stop(self) -> None:
        """Stop to read."""
        self._reader.stop()

    def take(self, value: bytes) -> None:
        """Follow an event, unless it is unknown, of another line, or older than its validity."""
        try:
            event = TrainerLag.model_validate_json(value)
        except ValidationError as error:
            log.warning("lag_event_invalid", topic=self._topic, error=str(error))
            return
        if event.line != self._line or self._clock() - event.time.timestamp() > event.valid_s:
            return
        if event.share != self.share:
            log.info("trace_share_changed", share=event.share, trainer_lag_s=event.lag_s)
        self._held = event.share, self._elapsed() + min(event.valid_s, MAX_VALID_S)

    def _take_all(self, records: Sequence[Message]) -> None:
        for record in records:
            self.take(record.value() or b"")
