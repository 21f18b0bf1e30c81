"""The dead-letter queue: lists dead letters, reads their content, and replays them after a fix.

The stream writes dead letters; this module never changes them. A replay publishes the record again with its key, value
and headers, and adds the header ``replay-of`` with its address, so that a dead letter of the replayed record leads back
to the original. The table ``replays`` records a replay after the broker has acknowledged it. A crash in between can
publish a record twice; the stream detects the second one as a duplicate.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import pyarrow as pa
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from pipeline.broker import TopicError, client_config, connect
from pipeline.dead_letters.reasons import DUPLICATE
from pipeline.delta import DeltaLog, escape_sql
from pipeline.offsets import HOLE, LOST_TO_RETENTION, SKIPPED, TOPIC_RECREATED
from schemas.batches import REPLAYS
from schemas.errors import UserError
from schemas.settings import Kafka

REPLAY_OF = "replay-of"
"""Header of a replayed record: the address of its dead letter."""
PERMANENT = frozenset({DUPLICATE, "empty", "truncated", "corrupt"})
"""Reasons that no setting and no other worker version can resolve."""
_NEVER_READ = {
    LOST_TO_RETENTION: "lost to retention before they were read",
    SKIPPED: "skipped before they were read",
    HOLE: "offsets without a record",
    TOPIC_RECREATED: "end of a log that was deleted",
}
BATCH_RECORDS = 64
"""Dead letters that are read and published together."""
BATCH_BYTES = 16 << 20
ACK_TIMEOUT_S = 60.0


class DeadLetterError(UserError):
    """A dead letter does not exist, or cannot be replayed."""


class RecordAddress(NamedTuple):
    """Topic, partition and offset of a record."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"


@dataclass(frozen=True, slots=True)
class Replay:
    """One replay of a dead letter."""

    time: datetime
    new_address: RecordAddress
    reason: str | None
    """Why the replayed record is a dead letter too; None if it is not, or not yet."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter without its content."""

    address: RecordAddress
    time: datetime
    reason: str
    detail: str
    rows: int | None
    """Number of verify steps in its header."""
    size: int | None
    """Bytes of its value; None without a value."""
    replays: tuple[Replay, ...]


@dataclass(frozen=True, slots=True)
class RecordContent:
    """Key, value and headers of a dead letter."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]

    @property
    def replay_of(self) -> str | None:
        """Address of the dead letter that this record is a replay of."""
        origins = [value for name, value in self.headers if name == REPLAY_OF and value]
        return origins[-1].decode(errors="replace") if origins else None


@dataclass(frozen=True, slots=True)
class DeadLetterFilter:
    """Selects dead letters: by address, or by reason and time. The newest come first."""

    addresses: tuple[RecordAddress, ...] = ()
    reason: str | None = None
    since: datetime | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """Dead letters that a replay would publish."""

    dead_letters: tuple[DeadLetter, ...]
    excluded: Mapping[str, int]
    """Number of other dead letters, by the reason for which they are excluded."""


def parse_address(text: str, topic: str) -> RecordAddress:
    """Parse ``TOPIC/PARTITION/OFFSET``, or ``PARTITION/OFFSET`` of the given topic.

    Raises:
        DeadLetterError: the text has another form.
    """
    found = re.fullmatch(r"(?:(.+)/)?([0-9]{1,9})/([0-9]{1,18})", text)
    if found is None:
        raise DeadLetterError(f"{text!r} is no record address: write TOPIC/PARTITION/OFFSET, or PARTITION/OFFSET")
    return RecordAddress(found[1] or topic, int(found[2]), int(found[3]))


def plan_replay(dead_letters: Sequence[DeadLetter], *, named: bool, again: bool) -> ReplayPlan:
    """Select the dead letters to replay. A dead letter is replayed once, unless ``again`` is set.

    Args:
        dead_letters: The candidates.
        named: Whether they were selected by address or reason. If not, those with permanent reasons are excluded.
        again: Include dead letters that were replayed before.
    """
    selected: list[DeadLetter] = []
    excluded: dict[str, int] = {}
    for dead_letter in sorted(dead_letters, key=lambda one: one.address):
        if why := _exclusion_reason(dead_letter, named=named, again=again):
            excluded[why] = excluded.get(why, 0) + 1
        else:
            selected.append(dead_letter)
    return ReplayPlan(tuple(selected), excluded)


class DeadLetterQueue:
    """The dead letters in the tables, and the topic that they are replayed to."""

    def __init__(self, tables: DeltaLog, kafka: Kafka) -> None:
        self._kafka = kafka
        self._tables = tables

    def find(self, wanted: DeadLetterFilter) -> list[DeadLetter]:
        """Return dead letters without their content, newest first.

        Raises:
            DeadLetterError: no dead letter exists at one of the addresses.
            TableError: the tables cannot be read.
        """
        columns = 'topic, partition, "offset", time, reason, detail, rows, size'
        order = 'order by time desc, topic, partition desc, "offset" desc'
        limit = "" if wanted.limit is None else f"limit {wanted.limit}"
        rows = self._select(f"select {columns} from dead_letters where {_condition(wanted)} {order} {limit}")  # noqa: S608 - quoted
        replays = self._read_replays()
        dead_letters = [
            DeadLetter(
                address := _address(row),
                row["time"],
                row["reason"],
                row["detail"],
                row["rows"],
                row["size"],
                tuple(replays.get(address, ())),
            )
            for row in rows
        ]
        if missing := set(wanted.addresses) - {dead_letter.address for dead_letter in dead_letters}:
            raise DeadLetterError(
                f"no dead letter {', '.join(map(str, sorted(missing)))}; `aurora dlq list` shows the existing ones"
            )
        return dead_letters

    def read_contents(self, addresses: Sequence[RecordAddress]) -> dict[RecordAddress, RecordContent]:
        """Return the content of dead letters. Records that were never read are not in the result."""
        columns = 'topic, partition, "offset", key, value, headers'
        never_read = ", ".join(map(_quote, _NEVER_READ))
        where = f"{_condition(DeadLetterFilter(tuple(addresses)))} and reason not in ({never_read})"
        rows = self._select(f"select {columns} from dead_letters where {where}")  # noqa: S608 - quoted
        return {
            _address(row): RecordContent(
                row["key"], row["value"], tuple((h["name"], h["value"]) for h in row["headers"] or [])
            )
            for row in rows
        }

    def replay(self, dead_letters: Sequence[DeadLetter]) -> Iterator[tuple[DeadLetter, RecordAddress]]:
        """Publish dead letters to ``kafka.traces_topic``, record each acknowledged one, and yield its new address.

        Raises:
            TopicError: the broker rejects one. Those before it are recorded.
            TableError: they cannot be read or recorded.
        """
        connect(self._kafka)
        for batch in _split_into_batches(dead_letters):
            contents = self.read_contents([dead_letter.address for dead_letter in batch])
            sent, error = _publish(self._kafka, {one.address: contents[one.address] for one in batch})
            self._record_replays(sent)
            yield from ((one, sent[one.address]) for one in batch if one.address in sent)
            if error is not None:
                raise TopicError(error)

    def _read_replays(self) -> dict[RecordAddress, list[Replay]]:
        """Return the replays of each dead letter, oldest first."""
        rows = self._select(
            "select r.*, d.reason from replays r left join dead_letters d on r.new_topic = d.topic "
            'and r.new_partition = d.partition and r.new_offset = d."offset" order by r.time'
        )
        replays: dict[RecordAddress, list[Replay]] = {}
        for row in rows:
            new_address = RecordAddress(row["new_topic"], row["new_partition"], row["new_offset"])
            replays.setdefault(_address(row), []).append(Replay(row["time"], new_address, row["reason"]))
        return replays

    def _record_replays(self, sent: Mapping[RecordAddress, RecordAddress]) -> None:
        if not sent:
            return
        now = time.time_ns() // 1000
        rows = [[now, *origin, *new_address] for origin, new_address in sent.items()]
        columns = [pa.array(column, f.type) for column, f in zip(zip(*rows, strict=True), REPLAYS, strict=True)]
        self._tables.append("replays", pa.table(columns, schema=REPLAYS))

    def _select(self, sql: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._tables.query(sql).read_all().to_pylist()
        return rows


def _exclusion_reason(dead_letter: DeadLetter, *, named: bool, again: bool) -> str | None:
    if dead_letter.reason in _NEVER_READ:
        return f"{_NEVER_READ[dead_letter.reason]}, so there is nothing to publish"
    if dead_letter.size is None:
        return "without a value"
    if dead_letter.replays and not again:
        return "replayed before (--again repeats it)"
    if dead_letter.reason in PERMANENT and not named:
        return "permanently unusable (--reason includes them)"
    return None


def _condition(wanted: DeadLetterFilter) -> str:
    """Return a SQL condition."""
    conditions = ["true"]
    if wanted.addresses:
        by_partition = groupby(sorted(wanted.addresses), key=lambda address: address[:2])
        conditions.append(
            " or ".join(
                f'(topic = {_quote(topic)} and partition = {partition} and "offset" in '
                f"({', '.join(str(address.offset) for address in addresses)}))"
                for (topic, partition), addresses in by_partition
            )
        )
    if wanted.reason is not None:
        conditions.append(f"reason = {_quote(wanted.reason)}")
    elif not wanted.addresses:
        conditions.append(f"reason <> {_quote(HOLE)}")  # nothing is missing there, and there may be many
    if wanted.since is not None:
        conditions.append(f"time >= to_timestamp_micros({round(wanted.since.timestamp() * 1e6)})")
        conditions.append(f"day >= {_quote(f'{wanted.since.astimezone(UTC):%Y-%m-%d}')}")
    return " and ".join(f"({condition})" for condition in conditions)


def _quote(text: str) -> str:
    return f"'{escape_sql(text)}'"


def _address(row: Mapping[str, Any]) -> RecordAddress:
    return RecordAddress(row["topic"], row["partition"], row["offset"])


def _split_into_batches(dead_letters: Sequence[DeadLetter]) -> Iterator[list[DeadLetter]]:
    batch: list[DeadLetter] = []
    for dead_letter in dead_letters:
        size = sum(one.size or 0 for one in batch) + (dead_letter.size or 0)
        if batch and (len(batch) == BATCH_RECORDS or size > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(dead_letter)
    if batch:
        yield batch


def _publish(
    kafka: Kafka, contents: Mapping[RecordAddress, RecordContent]
) -> tuple[dict[RecordAddress, RecordAddress], str | None]:
    """Publish records. Return the new address of each acknowledged one, and the error if some were not acknowledged."""
    sent: dict[RecordAddress, RecordAddress] = {}
    failed: dict[RecordAddress, str] = {}
    # One message per batch: the broker rejects whole batches, and one dead letter must not block others.
    options = {"enable.idempotence": True, "acks": "all", "message.max.bytes": 1_000_000_000, "batch.num.messages": 1}
    producer = Producer(client_config(kafka, **options))

    def on_delivery(origin: RecordAddress, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            failed[origin] = error.str()
        else:
            sent[origin] = RecordAddress(message.topic() or "", message.partition() or 0, message.offset() or 0)

    for origin, content in contents.items():
        headers: list[tuple[str, str | bytes | None]] = [*content.headers, (REPLAY_OF, str(origin))]
        try:
            producer.produce(
                kafka.traces_topic,
                content.value,
                key=content.key,
                headers=headers,
                on_delivery=partial(on_delivery, origin),
            )
        except (KafkaException, BufferError) as error:
            failed[origin] = str(error)
    pending = producer.flush(ACK_TIMEOUT_S)
    if not failed and not pending:
        return sent, None
    first = next(iter(failed.items()), (None, f"no answer within {ACK_TIMEOUT_S:g} s"))
    return sent, (
        f"{len(contents) - len(sent)} of {len(contents)} dead letters were not replayed: {first[0] or 'all'}: "
        f"{first[1]}; check kafka.bootstrap_servers, kafka.client_options and max.message.bytes of the topic"
    )
