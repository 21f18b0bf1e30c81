"""Reads a whole topic in a thread of its own, without a consumer group: every node needs every record.

Nothing here can fail the node: an unreachable broker or topic is logged and tried again. A partition is read on where
it was left, also after an outage, and a new partition is found. A topic that was emptied or created again is read from
its oldest record.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from schemas.settings import Kafka, SettingsError

log = structlog.get_logger()

_POLL_S = 0.5
_BATCH = 500
"""Maximum number of records that are handed over together."""
_REQUEST_S = 5.0
_RETRY_S = 2.0
_HARMLESS = (KafkaError._PARTITION_EOF, KafkaError.GROUP_AUTHORIZATION_FAILED)
"""Errors that stop no record. The client looks for the coordinator of the group that it names and never joins."""
_REFRESH_S = 30.0
"""Interval at which partitions and positions are compared with the broker's."""


class TopicReader:
    """Hands the records of a topic to a function.

    Args:
        kafka: The broker.
        topic: The topic.
        name: Of the thread and of the group that is never joined.
        take: Takes records; called from the reader's thread.
        newest: Number of the newest records that are read at start.

    Raises:
        SettingsError: ``kafka.client_options`` has an option that the client does not know.
    """

    def __init__(
        self, kafka: Kafka, topic: str, name: str, take: Callable[[Sequence[Message]], None], newest: int = 0
    ) -> None:
        self._topic, self._take, self._newest = topic, take, newest
        options = {
            "bootstrap.servers": kafka.bootstrap_servers,
            "group.id": f"aurora-{name}",  # the client demands one; no group is joined, and no offset is committed
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "allow.auto.create.topics": False,
            "topic.metadata.refresh.interval.ms": 10_000,
            "queued.max.messages.kbytes": 4096,
            "reconnect.backoff.max.ms": 2000,
            "log_level": 0,
            "error_cb": self._on_error,
        }
        try:
            self._consumer = Consumer({**kafka.client_options, **options})
        except (KafkaException, ValueError) as error:
            raise SettingsError(f"kafka.bootstrap_servers or kafka.client_options: {error}") from error
        self._next: dict[int, int] = {}
        """Offset of the next record to read by partition."""
        self.lag = 0
        """Records of the topic that are not yet read, at the last look."""
        self.error: str | None = None
        """Why no records arrive; None while they do."""
        self._client_error: str | None = None
        """The last error of a connection, which says more than that a request was not answered."""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start to read."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; wait for the thread, unless the broker does not answer."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(2 * _POLL_S)

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self._assign()
                self._read(time.monotonic() + _REFRESH_S)
            except KafkaException as error:
                self._report(self._client_error or error.args[0].str())
                self._ending.wait(_RETRY_S)
            except Exception:
                # An unforeseen error must not end this thread: the node would read no record again.
                log.exception("topic_reader_failed", topic=self._topic)
                self._ending.wait(_RETRY_S)
        self._consumer.close()

    def _report(self, error: str) -> None:
        """Keep the reason why no records arrive, and log it when it changes."""
        if error != self.error:
            log.warning("topic_unreachable", topic=self._topic, error=error)
        self.error, self._client_error = error, None

    def _assign(self) -> None:
        """Read from every partition on: where it was read to, or else from its newest records.

        Raises:
            KafkaException: the broker or the topic is unreachable.
        """
        found = self._consumer.list_topics(self._topic, timeout=_REQUEST_S).topics[self._topic]
        if found.error is not None:
            raise KafkaException(found.error)
        newest = -(-self._newest // len(found.partitions))
        next_offsets, lag = {}, 0
        for partition in found.partitions:
            low, high = self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), _REQUEST_S)
            position = self._next.get(partition, high - newest)
            # An offset beyond the end belongs to a topic that was deleted and created again.
            next_offsets[partition] = max(low, position) if position <= high else low
            lag += high - next_offsets[partition]
        if next_offsets != self._next:
            self._next = next_offsets
            self._consumer.assign([TopicPartition(self._topic, *place) for place in next_offsets.items()])
        self.lag, self.error = lag, None

    def _read(self, until: float) -> None:
        """Hand over the records that arrive, until a time by the monotonic clock.

        Raises:
            KafkaException: the topic cannot be read.
        """
        while not self._ending.is_set() and time.monotonic() < until:
            messages = self._consumer.consume(_BATCH, _POLL_S)
            records = [message for message in messages if message.error() is None]
            for record in records:
                self._next[record.partition() or 0] = (record.offset() or 0) + 1
            if records:
                self._take(records)
            if messages:
                self.lag = sum(map(self._remaining, self._next))
            for message in messages:
                if (error := message.error()) is not None and error.code() not in _HARMLESS:
                    raise KafkaException(error)

    def _remaining(self, partition: int) -> int:
        """Return the number of unread records of a partition, from the last fetch."""
        try:
            _, high = self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), cached=True)
        except KafkaException:
            return 0
        return max(high - self._next[partition], 0)

    def _on_error(self, error: KafkaError) -> None:
        self._client_error = error.str()
