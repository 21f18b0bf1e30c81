"""Publishes finished answers to the answers topic.

An answer that does not reach the topic costs other nodes a few accepted draft tokens and nothing else. So an answer is
sent once, waits for the broker for ``_TIMEOUT_S`` in a queue of ``_QUEUE_KBYTES``, and is then dropped and counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from prometheus_client import Metric

from schemas.answers import Answer, AnswerError, cut_answer, encode, is_shared
from schemas.settings import Kafka, SettingsError
from schemas.settings.sections import SuffixScope
from serving.answers.answer_counts import AnswerAccounting, AnswerCounts
from serving.engines.base import Request

log = structlog.get_logger()

Unpublished = Literal["queue_full", "undelivered", "unencodable", "closed"]
"""Why an answer was not published."""

_TIMEOUT_S = 30
_QUEUE_KBYTES = 4096


def connect(kafka: Kafka) -> Producer:
    """Return a producer.

    Raises:
        SettingsError: ``kafka.client_options`` has an option that the client does not know.
    """
    options = {
        "bootstrap.servers": kafka.bootstrap_servers,
        "acks": "all",
        "message.timeout.ms": _TIMEOUT_S * 1000,
        "queue.buffering.max.kbytes": _QUEUE_KBYTES,
        "linger.ms": 20,
        "compression.type": "lz4",
        "reconnect.backoff.max.ms": 2000,
        "log_level": 0,
    }
    try:
        return Producer({**kafka.client_options, **options})
    except (KafkaException, ValueError) as error:
        raise SettingsError(f"kafka.bootstrap_servers or kafka.client_options: {error}") from error


class AnswerPublisher:
    """An ``AnswerSink`` that publishes to Kafka. Engines of any kind use it; it is thread-safe.

    Args:
        kafka: Broker and topic.
        scope: Answers that no other request is drafted from are not published.
        connect_producer: Creates the producer; replaced by tests.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        kafka: Kafka,
        scope: SuffixScope,
        connect_producer: Callable[[Kafka], Producer] = connect,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._topic, self._scope, self._clock = kafka.answers_topic, scope, clock
        self._producer = connect_producer(kafka)
        self._accounting = AnswerAccounting("published", get_args(Unpublished))
        self._node = self._line = ""
        self._is_closed = False

    def start(self, node: str, line: str) -> None:
        """Set the node and the line that every answer names."""
        self._node, self._line = node, line

    def publish(self, request: Request, output: Sequence[int]) -> None:
        """Publish the answer to a request that may be traced. Never blocks, never raises."""
        if not request.trace or not is_shared(self._scope, request.label):
            return
        if self._is_closed:
            self._accounting.drop("closed")
            return
        try:
            prompt_tokens, tokens = cut_answer(request.prompt, output)
            time_us = round(self._clock() * 1e6)
            answer = Answer(self._line, self._node, request.id, request.label, time_us, prompt_tokens, tokens)
            self._producer.produce(self._topic, value=encode(answer), on_delivery=self._on_delivery)
        except BufferError:
            self._accounting.drop("queue_full")
        except AnswerError as error:
            log.warning("answer_unencodable", request=request.id, error=str(error))
            self._accounting.drop("unencodable")
        except Exception:
            # The engine's thread must survive any error of a malformed answer or of the client library.
            log.exception("answer_unpublished", request=request.id)
            self._accounting.drop("undelivered")
        self._producer.poll(0)

    def counts(self) -> AnswerCounts:
        """Return the counts of answers."""
        self._producer.poll(0)
        return self._accounting.counts()

    def close(self, timeout: float) -> AnswerCounts:
        """Publish the waiting answers for at most ``timeout`` seconds; drop and count the rest."""
        self._is_closed = True
        self._producer.flush(timeout)
        self._producer.purge()
        self._producer.flush(1)
        return self._accounting.counts()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics at scrape time."""
        self._producer.poll(0)
        yield from self._accounting.collect()

    def _on_delivery(self, error: KafkaError | None, _message: Message) -> None:
        if error is None:
            self._accounting.add(1)
        else:
            self._accounting.drop("closed" if self._is_closed else "undelivered")
