"""The answers topic beside its nodes: refilled from the table ``traces``, and described.

Only traced requests are in the table, so a request that opted out is in neither. An answer is complete if its table
rows reach from the first prompt token to the last output token; others are skipped and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import groupby
from operator import itemgetter
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition

from pipeline.broker import TIMEOUT_S, TopicError, client_config, connect
from pipeline.delta import DeltaLog, escape_sql
from schemas.answers import Answer, AnswerError, cut_answer, decode, encode, is_shared
from schemas.settings import Kafka
from schemas.settings.sections import SuffixScope

_REQUESTS = 500
"""Requests whose rows are read together."""
_LONGEST = timedelta(days=1)
"""Rows of a request are looked for this long before its end."""
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A traced request that ended with a complete answer."""

    node: str
    request: str
    time: datetime
    """When it ended."""


@dataclass
class RebuildCounts:
    """Progress of a rebuild."""

    requests: int
    """Requests in the span."""
    published: int = 0
    tokens: int = 0
    record_bytes: int = 0
    incomplete: int = 0
    """Requests of which the table lacks rows."""
    out_of_scope: int = 0
    """Answers that no other request is drafted from."""
    undelivered: int = 0
    """Answers that the broker did not accept."""


@dataclass
class TopicStats:
    """Contents of the topic."""

    answers: int = 0
    tokens: int = 0
    """Tokens of the answers, and of the ends of their prompts."""
    record_bytes: int = 0
    """Bytes of the records, before the compression of the client and without the framing of the broker."""
    corrupt: int = 0
    oldest: datetime | None = None
    newest: datetime | None = None
    tokens_by_label: Counter[str | None] = field(default_factory=Counter)
    tokens_by_node: Counter[str] = field(default_factory=Counter)
    tokens_by_line: Counter[str] = field(default_factory=Counter)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes per token; None without tokens."""
        return self.record_bytes / self.tokens if self.tokens else None

    def add(self, record: bytes) -> None:
        """Count a record."""
        try:
            answer = decode(record)
        except AnswerError:
            self.corrupt += 1
            return
        tokens, time = len(answer.tokens), datetime.fromtimestamp(answer.time_us / 1e6, UTC)
        self.answers += 1
        self.tokens += tokens
        self.record_bytes += len(record)
        self.oldest = min(self.oldest or time, time)
        self.newest = max(self.newest or time, time)
        self.tokens_by_label[answer.label] += tokens
        self.tokens_by_node[answer.node] += tokens
        self.tokens_by_line[answer.line] += tokens


def list_finished(tables: DeltaLog, begin: datetime, end: datetime) -> list[FinishedRequest]:
    """Return the requests that ended in a span with a complete answer, in the order of their ends.

    Raises:
        TableError: the table cannot be read.
    """
    query = (
        f"select node, request, max(time) as time from traces where last_chunk and finish in ('stop', 'length') "  # noqa: S608 - times
        f"and {_in_days(begin, end)} group by node, request "
        f"having max(time) >= {_timestamp(begin)} and max(time) < {_timestamp(end)} order by 3, 2, 1"
    )
    return [FinishedRequest(**row) for batch in tables.query(query) for row in batch.to_pylist()]


def rebuild(
    tables: DeltaLog, kafka: Kafka, requests: list[FinishedRequest], scope: SuffixScope
) -> Iterator[RebuildCounts]:
    """Publish the answers to requests, oldest first; yield the counts after each part.

    Each record has the time at which its answer ended, so that ``kafka.retention`` counts from then. A caller that
    stops iterating leaves the records that were sent before.

    Raises:
        TableError: the table cannot be read.
        TopicError: the broker does not answer, or does not accept the records.
    """
    counts = RebuildCounts(len(requests))
    connect(kafka)
    producer = Producer(client_config(kafka, **{"acks": "all", "compression.type": "lz4", "linger.ms": 20}))

    def count_delivery(error: KafkaError | None, _message: Message) -> None:
        counts.undelivered += error is not None

    for first in range(0, len(requests), _REQUESTS):
        for answer in read_answers(tables, requests[first : first + _REQUESTS], counts):
            if not is_shared(scope, answer.label):
                counts.out_of_scope += 1
                continue
            record = encode(answer)
            time_ms = answer.time_us // 1000
            producer.produce(kafka.answers_topic, value=record, timestamp=time_ms, on_delivery=count_delivery)
            counts.published += 1
            counts.tokens += len(answer.tokens)
            counts.record_bytes += len(record)
        if producer.flush(TIMEOUT_S) or counts.undelivered:
            raise TopicError(
                f"topic {kafka.answers_topic} at {kafka.bootstrap_servers} did not accept all answers; check "
                f"kafka.answers_topic and kafka.client_options"
            )
        yield counts


def read_answers(tables: DeltaLog, requests: Iterable[FinishedRequest], counts: RebuildCounts) -> Iterator[Answer]:
    """Yield the answers to requests, in their order; count those that are incomplete."""
    times = {(one.node, one.request): one.time for one in requests}
    names = ", ".join(f"'{escape_sql(request)}'" for _, request in times)
    query = (
        f"select node, request, line, label, verify_step, tokens, bonus, position from traces "  # noqa: S608 - escaped
        f"where request in ({names}) and {_in_days(min(times.values()), max(times.values()))} "
        f"order by node, request, position"
    )
    rows = (row for batch in tables.query(query) for row in batch.to_pylist())
    answers = {}
    for key, steps in groupby(rows, key=itemgetter("node", "request")):
        if key in times and (answer := _join_steps(list(steps), times[key])) is not None:
            answers[key] = answer
    counts.incomplete += len(times) - len(answers)
    yield from (answers[key] for key in times if key in answers)


def describe_topic(kafka: Kafka) -> TopicStats:
    """Read the whole topic and return its statistics.

    Raises:
        TopicError: the broker does not answer, or has no such topic.
    """
    topic, stats = kafka.answers_topic, TopicStats()
    found = connect(kafka).list_topics(topic, timeout=TIMEOUT_S).topics[topic]
    if found.error is not None:
        raise TopicError(
            f"topic {topic} at {kafka.bootstrap_servers}: {found.error.str()}; a stream worker creates it, or "
            f"`aurora topics apply`; check kafka.answers_topic"
        )
    # Assigning partitions joins no group, and no offset is committed.
    options = {"group.id": "aurora-answers", "enable.auto.commit": False, "enable.partition.eof": True}
    try:
        with closing(Consumer(client_config(kafka, **options))) as consumer:
            for partition in found.partitions:
                for record in _read_partition(consumer, topic, partition):
                    stats.add(record)
    except KafkaException as error:
        raise TopicError(f"topic {topic}: {error.args[0].str()}; check kafka.bootstrap_servers") from error
    return stats


def _read_partition(consumer: Consumer, topic: str, partition: int) -> Iterator[bytes]:
    """Yield the records that the partition has now."""
    low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), TIMEOUT_S)
    consumer.assign([TopicPartition(topic, partition, low)])
    position = low
    while position < high:
        message = consumer.poll(_POLL_S)
        if message is None:
            continue
        error = message.error()
        if error is None:
            position = (message.offset() or 0) + 1
            yield message.value() or b""
        elif error.code() == KafkaError._PARTITION_EOF:
            return
        else:
            raise KafkaException(error)


def _join_steps(steps: list[dict[str, Any]], time: datetime) -> Answer | None:
    """Return the answer of a request's verify steps, ordered by position; None if one of them is missing."""
    tokens: list[int] = []
    prompt = 0
    for step in steps:
        if step["position"] != len(tokens):
            return None
        tokens += step["tokens"]
        if step["verify_step"] == 0:
            prompt = len(tokens)
    last = steps[-1]
    if last["bonus"] is None:
        return None
    prompt_tokens, kept = cut_answer(tokens[:prompt], [*tokens[prompt:], last["bonus"]])
    return Answer(
        last["line"], last["node"], last["request"], last["label"], round(time.timestamp() * 1e6), prompt_tokens, kept
    )


def _in_days(begin: datetime, end: datetime) -> str:
    """Return a condition on the day, which skips the files of other days: it is the broker's, so it may be the next."""
    first, last = ((begin - _LONGEST).astimezone(UTC).date(), (end + _LONGEST).astimezone(UTC).date())
    return f"day >= '{first}' and day <= '{last}'"


def _timestamp(time: datetime) -> str:
    return f"to_timestamp_micros({round(time.timestamp() * 1e6)})"
