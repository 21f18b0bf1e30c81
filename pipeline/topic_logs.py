"""Which log of a topic the tables are filled from.

A topic that is deleted and created anew keeps its name, but its log is another one: its offsets begin at 0 again. Kafka
gives each log an id (KIP-516). The tables number the logs of a topic by these ids. To the tables each log is a topic of
its own, with offsets of its own: the first one has the name of the topic, the second one is ``<topic>@2``.

Two application transactions of ``dead_letters`` hold the numbers: ``log/<topic>`` that of the newest log, and
``log/<topic>/<id>`` that of the log with an id. Both change in the commit that records a new log. When a worker starts,
and before it reads any record, it settles which log it reads; it ends when the topic has another id.

An id alone does not decide. A copy of a topic on another cluster has another id and the same records at the same
offsets, and a log that was cut and has grown again has the same id. So the last record in the tables is compared with
the record at its offset in the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import pyarrow as pa
import pyarrow.compute as pc
import structlog
from confluent_kafka import Message

from pipeline.batches import identify
from pipeline.broker import RecordProbe, Watermarks
from pipeline.deduplication import COLUMNS, ChunkIdentity, read_written
from pipeline.delta import DeltaLog
from pipeline.offsets import (
    NEVER_READ,
    TOPIC_RECREATED,
    ConflictError,
    FencedError,
    ForeignLogError,
    LogRange,
    Snapshot,
    SourcePartition,
    log_name,
    transaction_id,
)
from schemas.batches import DEAD_LETTERS, day_of

log = structlog.get_logger()

COMPARED_OFFSETS = 1024
"""Offsets before the next one in which the last record of the tables is looked for; the others may be holes."""
_TABLE = "dead_letters"
_NEVER_READ = pa.array(NEVER_READ)


class TopicRecreatedError(ForeignLogError):
    """The topic was deleted and created anew while a worker read it."""


@dataclass(frozen=True, slots=True)
class TopicLog:
    """One log of a topic."""

    topic: str
    """The topic's name on the broker."""
    number: int
    """1 for the first log that the tables were filled from."""
    topic_id: str | None
    """None if the broker has no ids."""

    @property
    def name(self) -> str:
        """The topic's name in the tables."""
        return log_name(self.topic, self.number)

    def source(self, partition: int) -> SourcePartition:
        """Return a partition under its name in the tables."""
        return SourcePartition(self.name, partition)

    def check_id(self, topic_id: str | None) -> None:
        """Compare the id that the topic has now.

        Raises:
            TopicRecreatedError: it is another one.
        """
        if topic_id != self.topic_id:
            raise TopicRecreatedError(
                f"topic {self.topic} was deleted and created anew: its id is {topic_id}, not {self.topic_id}. The next "
                f"worker reads its new log from the start"
            )


class Evidence(Enum):
    """What the records of the tables say about a log."""

    SAME = "the log has the last record of the tables at its offset"
    OTHER = "the log has another record there, or none"
    UNKNOWN = "either of them no longer has the record"
    EMPTY = "the tables have no record of the topic's newest log"


@dataclass(frozen=True, slots=True)
class LastRecord:
    """The last record that the tables have of a partition: what it is compared by."""

    offset: int
    identity: ChunkIdentity | None
    """Of a record with rows in ``traces``."""
    content: tuple[bytes | None, bytes | None] = (None, None)
    """Key and value of a dead letter."""

    def equals(self, message: Message | None) -> bool:
        """Return whether a record of the broker is this one; None is no record."""
        if message is None:
            return False
        key, value = _to_bytes(message.key()), _to_bytes(message.value())
        if self.identity is None:
            return self.content == (key, value)
        return self.identity == identify(value)


def choose_number(newest: int | None, evidence: Evidence) -> int:
    """Return the number of a log whose id the tables do not know.

    Args:
        newest: Number of the newest known log; None if the tables know none: they are new, or of an older release.
        evidence: About the log, from the newest one's records.
    """
    if evidence in {Evidence.SAME, Evidence.EMPTY} or (newest is None and evidence is Evidence.UNKNOWN):
        return newest or 1
    # Where the record is unknown because the log begins behind it, the tables have none of the log's records.
    return (newest or 1) + 1


def read_newest(tables: DeltaLog, topic: str) -> TopicLog:
    """Return the newest log of a topic that the tables know, without its id."""
    return TopicLog(topic, tables.snapshot(_TABLE).transaction(f"log/{topic}") or 1, None)


def settle(topic: str, tables: DeltaLog, watermarks: Watermarks, probe: RecordProbe, time_us: int) -> TopicLog:
    """Return the log that the topic has now, after recording it in the tables if they do not know it.

    Args:
        topic: Name on the broker.
        tables: The tables that are filled from it.
        watermarks: Connection to the broker.
        probe: Reads single records.
        time_us: Unix time of the rows that record a new log, in microseconds.

    Raises:
        BrokerError: the broker does not answer, or does not have the topic.
        TableError: the store failed.
    """
    described = watermarks.describe(topic)
    if described.topic_id is None:
        return read_newest(tables, topic)
    while True:
        newest, known = _read_numbers(tables.snapshot(_TABLE), topic, described.topic_id)
        if known is not None:
            return TopicLog(topic, known, described.topic_id)
        before = TopicLog(topic, newest or 1, described.topic_id)
        ends = _read_ends(tables, before, range(described.partitions))
        evidence = _examine(ends, tables, watermarks, probe)
        chosen = TopicLog(topic, choose_number(newest, evidence), described.topic_id)
        snapshot = tables.snapshot(_TABLE)
        if _read_numbers(snapshot, topic, described.topic_id) != (newest, known):
            continue  # another worker was faster
        try:
            record(chosen, snapshot, ends, time_us, "the topic was deleted and created anew")
        except (ConflictError, FencedError):
            continue
        if chosen.number > before.number:
            log.warning("topic_recreated", topic=topic, id=chosen.topic_id, name_in_tables=chosen.name)
        elif newest is not None:
            log.warning("topic_id_changed", topic=topic, id=chosen.topic_id, why=evidence.value)
        return chosen


def begin(topic: str, tables: DeltaLog, watermarks: Watermarks, time_us: int, why: str) -> TopicLog:
    """Record what the topic has now as a new log, whatever the tables know about it, and return it.

    Args:
        topic: Name on the broker.
        tables: The tables that are filled from it.
        watermarks: Connection to the broker.
        time_us: Unix time of the rows that record it, in microseconds.
        why: What the rows say happened.

    Raises:
        BrokerError: the broker does not answer, or does not have the topic.
        ConflictError: another process has changed the table.
        TableError: the store failed.
    """
    described = watermarks.describe(topic)
    snapshot = tables.snapshot(_TABLE)
    before = TopicLog(topic, snapshot.transaction(f"log/{topic}") or 1, described.topic_id)
    new = TopicLog(topic, before.number + 1, described.topic_id)
    record(new, snapshot, _read_ends(tables, before, range(described.partitions)), time_us, why)
    return new


def record(new: TopicLog, snapshot: Snapshot, ends: Mapping[SourcePartition, int], time_us: int, why: str) -> None:
    """Record a log in one commit: its number, and for each partition of the log before it a row about its end.

    Args:
        new: The log.
        snapshot: Of ``dead_letters``, on which the number was chosen.
        ends: Next offsets of the log before it.
        time_us: Unix time of the rows, in microseconds.
        why: What the rows say happened.

    Raises:
        ConflictError: another process has changed the table.
        TableError: the store failed.
    """
    detail = (
        f"{why}: the tables have the records of its new log (id {new.topic_id}) under {new.name}; records of the old "
        f"log from offset {{}} on, if there were any, are lost"
    )
    rows = [
        {
            **dict.fromkeys(DEAD_LETTERS.names),
            "topic": source.topic,
            "partition": source.partition,
            "offset": end,
            "time": time_us,
            "day": day_of(time_us),
            "reason": TOPIC_RECREATED,
            "detail": detail.format(end),
        }
        for source, end in sorted(ends.items())
        if source.topic != new.name
    ]
    transactions = dict.fromkeys(_keys(new.topic, new.topic_id), new.number)
    snapshot.append(pa.Table.from_pylist(rows, schema=DEAD_LETTERS), transactions)


def read_last_record(tables: DeltaLog, source: SourcePartition, next_offset: int) -> LastRecord | None:
    """Return the last record that the tables have of a partition; None if they no longer have it."""
    offsets = range(max(0, next_offset - COMPARED_OFFSETS), next_offset)
    written = list(read_written(source, tables.read_offsets("traces", source, offsets, COLUMNS)))
    last = LastRecord(written[-1].offset, written[-1].identity) if written else None
    letters = tables.read_offsets("dead_letters", source, offsets, ["offset", "reason"])
    letters = letters.filter(pc.invert(pc.is_in(letters["reason"], value_set=_NEVER_READ)))
    newest = letters["offset"].to_pylist()[-1:]
    if newest and (last is None or newest[0] > last.offset):
        offsets = range(newest[0], newest[0] + 1)
        (row,) = tables.read_offsets("dead_letters", source, offsets, ["key", "value"]).to_pylist()
        return LastRecord(newest[0], None, (row["key"], row["value"]))
    return last


def compare(last: LastRecord | None, source: SourcePartition, log_range: LogRange, probe: RecordProbe) -> Evidence:
    """Compare the last record of the tables with the record at its offset in the log.

    Raises:
        BrokerError: the broker does not answer.
    """
    if last is None or last.offset < log_range.start or log_range.stable_end <= last.offset < log_range.end:
        return Evidence.UNKNOWN
    if last.offset >= log_range.end:
        return Evidence.OTHER
    found = probe.find_record(source, last.offset)
    return Evidence.SAME if found.offset == last.offset and last.equals(found.message) else Evidence.OTHER


def _read_numbers(snapshot: Snapshot, topic: str, topic_id: str) -> tuple[int | None, int | None]:
    """Return the number of the newest log of a topic, and that of the log with an id."""
    newest, of_id = (snapshot.transaction(key) for key in _keys(topic, topic_id))
    return newest, of_id


def _keys(topic: str, topic_id: str | None) -> list[str]:
    return [f"log/{topic}", *([f"log/{topic}/{topic_id}"] if topic_id else [])]


def _read_ends(tables: DeltaLog, of: TopicLog, partitions: range) -> dict[SourcePartition, int]:
    """Return the next offsets of the partitions of which the tables have records."""
    snapshot = tables.snapshot("accepted")  # the last one to be committed
    last = {source: snapshot.transaction(transaction_id("accepted", source)) for source in map(of.source, partitions)}
    return {source: offset + 1 for source, offset in last.items() if offset is not None}


def _examine(
    ends: Mapping[SourcePartition, int], tables: DeltaLog, watermarks: Watermarks, probe: RecordProbe
) -> Evidence:
    """Compare the partitions of a log. One partition that is the same decides: the log is a copy."""
    if not ends:
        return Evidence.EMPTY
    found = set()
    for source, log_range in watermarks.read(ends).items():
        if log_range.end < ends[source]:
            return Evidence.OTHER
        evidence = compare(read_last_record(tables, source, ends[source]), source, log_range, probe)
        if evidence is Evidence.SAME:
            return evidence
        found.add(evidence)
    return Evidence.OTHER if Evidence.OTHER in found else Evidence.UNKNOWN


def _to_bytes(content: str | bytes | None) -> bytes | None:
    return content.encode() if isinstance(content, str) else content
