"""Reads the answers topic, from its newest answers on, and hands the answers of other nodes to the engine.

Each node reads the whole topic in a thread of its own, without a consumer group. It starts at the newest
``serve.suffix_start_answers`` answers, so that its corpus is warm after a restart. Its own answers since the start are
in the corpus already, and are recognized by the node's name and their time.

Nothing here can fail the node: while the broker is unreachable the corpus learns from the node's own answers alone. A
topic that was emptied or created again is read from its oldest record.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from schemas.answers import Answer, AnswerError, decode, is_shared
from schemas.settings import Kafka, Serve, SettingsError
from serving.answers.answer_counts import AnswerAccounting, AnswerCounts

log = structlog.get_logger()

Unconsumed = Literal["own", "other_line", "other_scope", "corrupt"]
"""Why an answer of the topic was not handed to the engine: this process wrote it, it belongs to another line, the scope
does not share it, or its record cannot be used."""

_POLL_S = 0.5
_BATCH = 500
"""Maximum number of records that are handed to the engine together."""
_REQUEST_S = 5.0
_RETRY_S = 2.0
_HARMLESS = (KafkaError._PARTITION_EOF, KafkaError.GROUP_AUTHORIZATION_FAILED)
"""Errors that stop no record. The client looks for the coordinator of the group that it names and never joins."""
_REFRESH_S = 30.0
"""Interval at which partitions and positions are compared with the broker's."""


class AnswerConsumer:
    """Reads answers in a thread of its own.

    Args:
        kafka: Broker and topic.
        serve: Name of the node, scope, and number of answers that are read at start.
        learn: Takes answers; called from the consumer's thread, never blocks.
        clock: Unix time in seconds.

    Raises:
        SettingsError: ``kafka.client_options`` has an option that the client does not know.
    """

    def __init__(
        self,
        kafka: Kafka,
        serve: Serve,
        learn: Callable[[Sequence[Answer]], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._topic, self._serve, self._learn, self._clock = kafka.answers_topic, serve, learn, clock
        options = {
            "bootstrap.servers": kafka.bootstrap_servers,
            "group.id": "aurora-answers",  # the client demands one; no group is joined, and no offset is committed
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
        self._accounting = AnswerAccounting("consumed", get_args(Unconsumed))
        self._line, self._vocabulary = "", 0
        self._start_us = 0
        self._next: dict[int, int] = {}
        """Offset of the next record to read by partition."""
        self._lag = 0
        self._delay: float | None = None
        self._error: str | None = None
        self._client_error: str | None = None
        """The last error of a connection, which says more than that a request was not answered."""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    @property
    def lag(self) -> int:
        """Answers on the topic that are not yet read, at the last look."""
        return self._lag

    @property
    def error(self) -> str | None:
        """Why no answers arrive; None while they do."""
        return self._error

    def start(self, line: str, vocabulary: int) -> None:
        """Start to read the answers of a line.

        Args:
            line: The node's line.
            vocabulary: Size of the target's vocabulary; an answer with another token is corrupt.
        """
        self._line, self._vocabulary = line, vocabulary
        self._start_us = round(self._clock() * 1e6)
        self._thread.start()

    def stop(self) -> None:
        """Stop; wait for the thread."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()

    def counts(self) -> AnswerCounts:
        """Return the counts of answers."""
        return self._accounting.counts()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics at scrape time."""
        yield from self._accounting.collect()
        yield GaugeMetricFamily("aurora_serve_answers_lag", "Answers not yet read from the topic.", self._lag)
        yield GaugeMetricFamily(
            "aurora_serve_answers_delay_seconds",
            "Time from the end of the last consumed answer to its arrival here.",
            value=self._delay,
        )

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self._assign()
                self._read(time.monotonic() + _REFRESH_S)
            except KafkaException as error:
                self._report(self._client_error or error.args[0].str())
                self._ending.wait(_RETRY_S)
            except Exception:
                # An unforeseen error must not end this thread: the corpus would learn from no other node again.
                log.exception("answer_consumer_failed")
                self._ending.wait(_RETRY_S)
        self._consumer.close()

    def _report(self, error: str) -> None:
        """Keep the reason why no answers arrive, and log it when it changes."""
        if error != self._error:
            log.warning("answers_unreachable", topic=self._topic, error=error)
        self._error, self._client_error = error, None

    def _assign(self) -> None:
        """Read from every partition on: where it was read to, or else from its newest answers.

        Raises:
            KafkaException: the broker or the topic is unreachable.
        """
        found = self._consumer.list_topics(self._topic, timeout=_REQUEST_S).topics[self._topic]
        if found.error is not None:
            raise KafkaException(found.error)
        answers = -(-self._serve.suffix_start_answers // len(found.partitions))
        next_offsets, lag = {}, 0
        for partition in found.partitions:
            low, high = self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), _REQUEST_S)
            position = self._next.get(partition, high - answers)
            # An offset beyond the end belongs to a topic that was deleted and created again.
            next_offsets[partition] = max(low, position) if position <= high else low
            lag += high - next_offsets[partition]
        if next_offsets != self._next:
            self._next = next_offsets
            self._consumer.assign([TopicPartition(self._topic, *place) for place in next_offsets.items()])
        self._lag, self._error = lag, None

    def _read(self, until: float) -> None:
        """Hand the answers that arrive to the engine, until a time by the monotonic clock.

        Raises:
            KafkaException: the topic cannot be read.
        """
        while not self._ending.is_set() and time.monotonic() < until:
            messages = self._consumer.consume(_BATCH, _POLL_S)
            records = [message for message in messages if message.error() is None]
            answers = [answer for record in records if (answer := self._take(record)) is not None]
            if answers:
                self._learn(answers)
                self._accounting.add(len(answers))
                self._delay = self._clock() - answers[-1].time_us / 1e6
            if messages:
                self._lag = sum(self._remaining(partition) for partition in self._next)
            for message in messages:
                if (error := message.error()) is not None and error.code() not in _HARMLESS:
                    raise KafkaException(error)

    def _take(self, message: Message) -> Answer | None:
        """Return the answer of a record; None, and count the reason, if the engine must not have it."""
        self._next[message.partition() or 0] = (message.offset() or 0) + 1
        try:
            answer = decode(message.value() or b"")
        except AnswerError as invalid:
            log.warning("answer_corrupt", offset=message.offset(), error=str(invalid))
            self._accounting.drop("corrupt")
            return None
        reason = self._find_reason_to_drop(answer)
        if reason is not None:
            self._accounting.drop(reason)
            return None
        return answer

    def _find_reason_to_drop(self, answer: Answer) -> Unconsumed | None:
        if answer.line != self._line:
            return "other_line"
        is_own = answer.node == self._serve.node
        scope = self._serve.suffix_scope
        if not is_shared(scope, answer.label) or (scope == "node" and not is_own):
            return "other_scope"
        if is_own and answer.time_us >= self._start_us:
            return "own"
        if len(answer.tokens) and answer.tokens.max() >= self._vocabulary:
            return "corrupt"
        return None

    def _remaining(self, partition: int) -> int:
        """Return the number of unread records of a partition, from the last fetch."""
        try:
            _, high = self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), cached=True)
        except KafkaException:
            return 0
        return max(high - self._next[partition], 0)

    def _on_error(self, error: KafkaError) -> None:
        self._client_error = error.str()
