"""Reads the answers topic, from its newest answers on, and hands the answers of other nodes to the engine.

The node starts at the newest ``serve.suffix_start_answers`` answers, so that its corpus is warm after a restart. Its
own answers since the start are in the corpus already, and are recognized by the node's name and their time. While the
topic is unreachable, the corpus learns from the node's own answers alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import structlog
from confluent_kafka import Message
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from schemas.answers import Answer, AnswerError, decode, is_shared
from schemas.settings import Kafka, Serve
from serving.answers.answer_counts import AnswerAccounting, AnswerCounts
from serving.topic_reader import TopicReader

log = structlog.get_logger()

Unconsumed = Literal["own", "other_line", "other_scope", "corrupt"]
"""Why an answer of the topic was not handed to the engine: this process wrote it, it belongs to another line, the scope
does not share it, or its record cannot be used."""


class AnswerConsumer:
    """Reads answers.

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
        self._serve, self._learn, self._clock = serve, learn, clock
        self._reader = TopicReader(kafka, kafka.answers_topic, "answers", self._take, serve.suffix_start_answers)
        self._accounting = AnswerAccounting("consumed", get_args(Unconsumed))
        self._line, self._vocabulary = "", 0
        self._start_us = 0
        self._delay: float | None = None

    @property
    def lag(self) -> int:
        """Answers on the topic that are not yet read, at the last look."""
        return self._reader.lag

    @property
    def error(self) -> str | None:
        """Why no answers arrive; None while they do."""
        return self._reader.error

    def start(self, line: str, vocabulary: int) -> None:
        """Start to read the answers of a line.

        Args:
            line: The node's line.
            vocabulary: Size of the target's vocabulary; an answer with another token is corrupt.
        """
        self._line, self._vocabulary = line, vocabulary
        self._start_us = round(self._clock() * 1e6)
        self._reader.start()

    def stop(self) -> None:
        """Stop to read."""
        self._reader.stop()

    def counts(self) -> AnswerCounts:
        """Return the counts of answers."""
        return self._accounting.counts()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics at scrape time."""
        yield from self._accounting.collect()
        yield GaugeMetricFamily("aurora_serve_answers_lag", "Answers not yet read from the topic.", self.lag)
        yield GaugeMetricFamily(
            "aurora_serve_answers_delay_seconds",
            "Time from the end of the last consumed answer to its arrival here.",
            value=self._delay,
        )

    def _take(self, records: Sequence[Message]) -> None:
        answers = [answer for record in records if (answer := self._decode(record)) is not None]
        if answers:
            self._learn(answers)
            self._accounting.add(len(answers))
            self._delay = self._clock() - answers[-1].time_us / 1e6

    def _decode(self, record: Message) -> Answer | None:
        """Return the answer of a record; None, and count the reason, if the engine must not have it."""
        try:
            answer = decode(record.value() or b"")
        except AnswerError as invalid:
            log.warning("answer_corrupt", offset=record.offset(), error=str(invalid))
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
