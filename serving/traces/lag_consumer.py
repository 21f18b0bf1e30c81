"""Follows the lag of the trainer on its topic: the share of the requests that a node publishes.

A thread of its own reads new events only, without a consumer group. An event holds until the next one, at most for its
validity. Without events, which is also the case without a broker, a trainer or the topic, the node publishes all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog
from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, TopicPartition
from pydantic import ValidationError

from schemas.events import TrainerLag
from schemas.settings import Kafka, SettingsError

log = structlog.get_logger()

MAX_VALID_S = 600.0
"""Longest validity of an event, whatever it says."""
_POLL_S = 0.5
_REQUEST_S = 5.0
_RETRY_S = 5.0
_HARMLESS = (KafkaError._PARTITION_EOF, KafkaError.GROUP_AUTHORIZATION_FAILED)
"""Errors that stop no record, as in ``AnswerConsumer``."""


class LagConsumer:
    """Reads the lag events of a line.

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
        options = {
            "bootstrap.servers": kafka.bootstrap_servers,
            "group.id": "aurora-lag",  # the client demands one; no group is joined, and no offset is committed
            "enable.auto.commit": False,
            "auto.offset.reset": "latest",
            "allow.auto.create.topics": False,
            "reconnect.backoff.max.ms": 2000,
            "log_level": 0,
        }
        try:
            self._consumer = Consumer({**kafka.client_options, **options})
        except (KafkaException, ValueError) as error:
            raise SettingsError(f"kafka.bootstrap_servers or kafka.client_options: {error}") from error
        self._line = ""
        self._held: tuple[float, float] = (1.0, 0.0)
        """Share of the last event, and the time until which it holds."""
        self._error: str | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainer-lag", daemon=True)

    @property
    def share(self) -> float:
        """Share of the requests to publish; from any thread."""
        share, until = self._held
        return share if self._elapsed() < until else 1.0

    def start(self, line: str) -> None:
        """Start to read the events of a line."""
        self._line = line
        self._thread.start()

    def stop(self) -> None:
        """Stop; wait for the thread, unless the broker does not answer."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(2 * _POLL_S)

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

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self._read()
            except KafkaException as error:
                self._report(error.args[0].str())
                self._ending.wait(_RETRY_S)
            except Exception:
                # An unforeseen error must not end this thread: the node would follow no event again.
                log.exception("lag_consumer_failed")
                self._ending.wait(_RETRY_S)
        self._consumer.close()

    def _read(self) -> None:
        """Read until the end, from the end of the topic on.

        Raises:
            KafkaException: the broker or the topic is unreachable.
        """
        found = self._consumer.list_topics(self._topic, timeout=_REQUEST_S).topics[self._topic]
        if found.error is not None:
            raise KafkaException(found.error)
        self._consumer.assign([TopicPartition(self._topic, partition, OFFSET_END) for partition in found.partitions])
        self._error = None
        while not self._ending.is_set():
            message = self._consumer.poll(_POLL_S)
            if message is None:
                continue
            if (error := message.error()) is None:
                self.take(message.value() or b"")
            elif error.code() not in _HARMLESS:
                raise KafkaException(error)

    def _report(self, error: str) -> None:
        """Log why no events arrive when it changes."""
        if error != self._error:
            log.info("lag_topic_unreachable", topic=self._topic, error=error)
        self._error = error
