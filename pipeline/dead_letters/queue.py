"""Dead letters after the fact: what lies there, what can still be read of it, and publishing it again after a fix.

The stream writes dead letters; nothing here changes them. A letter that is published again keeps its key, its bytes and
its headers, and gets one header more, ``replay-of`` with its address, so that a letter that comes of it leads back to
its origin. Which were published is noted in the table ``replays`` after the broker has them: a crash in between leads
to a record that comes twice, which the stream tells from the first by what it holds.
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

from pipeline.dead_letters.reasons import DUPLICATE
from pipeline.delta import DeltaLog
from pipeline.kafka_admin import TopicError, client, connect
from pipeline.offsets import LOST
from schemas.batches import REPLAYS
from schemas.errors import UserError
from schemas.settings import Kafka

REPLAY_OF = "replay-of"
"""Header of a record that was published again: the address of the dead letter that it was."""
FINAL = frozenset({DUPLICATE, "empty", "truncated", "corrupt"})
"""Reasons that no setting and no other worker can remove."""
TOGETHER = 64
"""Letters that are read and published together."""
MEGABYTES_TOGETHER = 16
ACKNOWLEDGED_S = 60.0


class DeadLetterError(UserError):
    """A dead letter that is not there, or that cannot be published again."""


class Address(NamedTuple):
    """Where a record stands, or stood."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"


@dataclass(frozen=True, slots=True)
class Replay:
    """What became of a dead letter that was published again."""

    time: datetime
    became: Address
    reason: str | None
    """Why it is a dead letter again; None where it is not, or not yet."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter without its bytes."""

    address: Address
    time: datetime
    reason: str
    detail: str
    rows: int | None
    """Verify steps that its header claims."""
    size: int | None
    """Bytes of its value; None where it has none."""
    replays: tuple[Replay, ...]


@dataclass(frozen=True, slots=True)
class Content:
    """What a dead letter carried."""

    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]

    @property
    def replay_of(self) -> str | None:
        """The dead letter that this one was before it was published again."""
        origins = [value for name, value in self.headers if name == REPLAY_OF and value]
        return origins[-1].decode(errors="replace") if origins else None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which letters: those of some addresses, or those of a reason since a time; newest first."""

    addresses: tuple[Address, ...] = ()
    reason: str | None = None
    since: datetime | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a replay would publish, and what it leaves out."""

    letters: tuple[Letter, ...]
    left_out: Mapping[str, int]
    """Letters by why they stay."""


def address_of(text: str, topic: str) -> Address:
    """The address that ``TOPIC/PARTITION/OFFSET`` names, or ``PARTITION/OFFSET`` of the given topic.

    Raises:
        DeadLetterError: it is written otherwise.
    """
    found = re.fullmatch(r"(?:(.+)/)?([0-9]{1,9})/([0-9]{1,18})", text)
    if found is None:
        raise DeadLetterError(f"{text!r} is no address of a record: write TOPIC/PARTITION/OFFSET, or PARTITION/OFFSET")
    return Address(found[1] or topic, int(found[2]), int(found[3]))


def plan(letters: Sequence[Letter], *, named: bool, again: bool) -> Plan:
    """Choose what to publish again: each letter once, unless it is to be done ``again``.

    Args:
        letters: The candidates.
        named: Whether they were chosen by address or reason; otherwise those of final reasons stay where they are.
        again: Also those that were published before.
    """
    kept: list[Letter] = []
    left_out: dict[str, int] = {}
    for letter in sorted(letters, key=lambda one: one.address):
        if why := _stays(letter, named=named, again=again):
            left_out[why] = left_out.get(why, 0) + 1
        else:
            kept.append(letter)
    return Plan(tuple(kept), left_out)


class DeadLetters:
    """The dead letters in the tables, and the topic that they go back to."""

    def __init__(self, tables: DeltaLog, kafka: Kafka) -> None:
        self._kafka = kafka
        self._tables = tables

    def find(self, wanted: Wanted) -> list[Letter]:
        """Letters without their bytes, newest first.

        Raises:
            DeadLetterError: one that was named by its address is not there.
            TableError: the tables cannot be read.
        """
        columns = 'topic, partition, "offset", time, reason, detail, rows, size'
        order = 'order by time desc, topic, partition desc, "offset" desc'
        limit = "" if wanted.limit is None else f"limit {wanted.limit}"
        where = _condition(wanted)
        rows = self._select(f"select {columns} from dead_letters where {where} {order} {limit}")  # noqa: S608 - quoted
        replays = self._replays()
        letters = [
            Letter(
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
        if missing := set(wanted.addresses) - {letter.address for letter in letters}:
            raise DeadLetterError(
                f"no dead letter {', '.join(map(str, sorted(missing)))}; `aurora dead list` shows which there are"
            )
        return letters

    def contents(self, addresses: Sequence[Address]) -> dict[Address, Content]:
        """What letters carried; a loss carried nothing, and is not among them."""
        columns = 'topic, partition, "offset", key, value, headers'
        where = f"{_condition(Wanted(tuple(addresses)))} and reason <> {_quoted(LOST)}"
        rows = self._select(f"select {columns} from dead_letters where {where}")  # noqa: S608 - quoted
        return {
            _address(row): Content(
                row["key"], row["value"], tuple((h["name"], h["value"]) for h in row["headers"] or [])
            )
            for row in rows
        }

    def replay(self, letters: Sequence[Letter]) -> Iterator[tuple[Letter, Address]]:
        """Publish letters to ``kafka.traces_topic`` as they were, and note each that the broker has.

        Raises:
            TopicError: the broker does not take one; those before it are noted.
            TableError: they cannot be read, or not be noted.
        """
        connect(self._kafka)
        for part in _together(letters):
            contents = self.contents([letter.address for letter in part])
            sent, refused = _publish(self._kafka, {letter.address: contents[letter.address] for letter in part})
            self._note(sent)
            yield from ((letter, sent[letter.address]) for letter in part if letter.address in sent)
            if refused is not None:
                raise TopicError(refused)

    def _replays(self) -> dict[Address, list[Replay]]:
        """By letter, the oldest first."""
        rows = self._select(
            "select r.*, d.reason from replays r left join dead_letters d on r.new_topic = d.topic "
            'and r.new_partition = d.partition and r.new_offset = d."offset" order by r.time'
        )
        replays: dict[Address, list[Replay]] = {}
        for row in rows:
            became = Address(row["new_topic"], row["new_partition"], row["new_offset"])
            replays.setdefault(_address(row), []).append(Replay(row["time"], became, row["reason"]))
        return replays

    def _note(self, sent: Mapping[Address, Address]) -> None:
        if not sent:
            return
        now = time.time_ns() // 1000
        rows = [[now, *origin, *became] for origin, became in sent.items()]
        columns = [pa.array(column, f.type) for column, f in zip(zip(*rows, strict=True), REPLAYS, strict=True)]
        self._tables.append("replays", pa.table(columns, schema=REPLAYS))

    def _select(self, sql: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._tables.query(sql).read_all().to_pylist()
        return rows


def _stays(letter: Letter, *, named: bool, again: bool) -> str | None:
    if letter.reason == LOST:
        return "lost before they were read, so there is nothing to publish"
    if letter.size is None:
        return "without a value"
    if letter.replays and not again:
        return "published again before (--again repeats it)"
    if letter.reason in FINAL and not named:
        return "unusable for good (--reason takes them nonetheless)"
    return None


def _condition(wanted: Wanted) -> str:
    """A condition of SQL."""
    conditions = ["true"]
    if wanted.addresses:
        of_partition = groupby(sorted(wanted.addresses), key=lambda address: address[:2])
        conditions.append(
            " or ".join(
                f'(topic = {_quoted(topic)} and partition = {partition} and "offset" in '
                f"({', '.join(str(address.offset) for address in addresses)}))"
                for (topic, partition), addresses in of_partition
            )
        )
    if wanted.reason is not None:
        conditions.append(f"reason = {_quoted(wanted.reason)}")
    if wanted.since is not None:
        conditions.append(f"time >= to_timestamp_micros({round(wanted.since.timestamp() * 1e6)})")
        conditions.append(f"day >= {_quoted(f'{wanted.since.astimezone(UTC):%Y-%m-%d}')}")
    return " and ".join(f"({condition})" for condition in conditions)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _address(row: Mapping[str, Any]) -> Address:
    return Address(row["topic"], row["partition"], row["offset"])


def _together(letters: Sequence[Letter]) -> Iterator[list[Letter]]:
    part: list[Letter] = []
    for letter in letters:
        size = sum(one.size or 0 for one in part) + (letter.size or 0)
        if part and (len(part) == TOGETHER or size > MEGABYTES_TOGETHER << 20):
            yield part
            part = []
        part.append(letter)
    if part:
        yield part


def _publish(kafka: Kafka, letters: Mapping[Address, Content]) -> tuple[dict[Address, Address], str | None]:
    """Which letters the broker has, and as which records; and why it has not all of them."""
    sent: dict[Address, Address] = {}
    failed: dict[Address, str] = {}
    # One message a batch: the broker refuses whole batches, and one letter must not keep others back.
    ours = {"enable.idempotence": True, "acks": "all", "message.max.bytes": 1_000_000_000, "batch.num.messages": 1}
    producer = Producer(client(kafka, **ours))

    def reported(origin: Address, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            failed[origin] = error.str()
        else:
            sent[origin] = Address(message.topic() or "", message.partition() or 0, message.offset() or 0)

    for origin, content in letters.items():
        headers: list[tuple[str, str | bytes | None]] = [*content.headers, (REPLAY_OF, str(origin))]
        try:
            producer.produce(
                kafka.traces_topic,
                content.value,
                key=content.key,
                headers=headers,
                on_delivery=partial(reported, origin),
            )
        except (KafkaException, BufferError) as error:
            failed[origin] = str(error)
    left = producer.flush(ACKNOWLEDGED_S)
    if not failed and not left:
        return sent, None
    first = next(iter(failed.items()), (None, f"no answer within {ACKNOWLEDGED_S:g} s"))
    return sent, (
        f"{len(letters) - len(sent)} of {len(letters)} dead letters were not published again: "
        f"{first[0] or 'all'}: {first[1]}; check kafka.bootstrap_servers, "
        "kafka.client_options and max.message.bytes of the topic"
    )
