"""Which log of a topic the tables are filled from: ids, the last record, and what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_tables import nothing
from stream_worker import chunk, claimed_chunks

from pipeline.batches import Record, build
from pipeline.broker import FoundRecord, TopicState
from pipeline.delta import DeltaLog
from pipeline.offsets import (
    COMMIT_ORDER,
    HOLE,
    TOPIC_RECREATED,
    Batch,
    LogRange,
    OffsetCommitter,
    SourcePartition,
    log_name,
)
from pipeline.topic_logs import Evidence, TopicLog, TopicRecreatedError, begin, choose_number, read_newest, settle
from schemas.claim_store import ClaimStore
from schemas.settings import Tables, Traces
from schemas.trace import record as trace
from schemas.trace.record import Chunk, encode

TOPIC = "traces"
NOW_US = 1_700_000_000_000_000


@dataclass
class Message:
    """A record as the client returns it."""

    record: Record

    def key(self) -> bytes | None:
        return self.record.key

    def value(self) -> bytes | None:
        return self.record.value


@dataclass
class Log:
    """A log of one partition on a broker."""

    topic_id: str | None
    records: Mapping[int, Record]
    start: int = 0
    before_read: Callable[[], None] = nothing
    reads: list[int] = field(default_factory=list)

    def describe(self, topic: str) -> TopicState:
        assert topic == TOPIC
        return TopicState(self.topic_id, 1)

    def read(self, sources: Iterable[SourcePartition]) -> dict[SourcePartition, LogRange]:
        end = max(self.records, default=self.start - 1) + 1
        return {source: LogRange(self.start, end, end) for source in sources}

    def find_record(self, _: SourcePartition, offset: int) -> FoundRecord:
        self.before_read()
        self.reads.append(offset)
        found = min(known for known in self.records if known >= offset)
        message: Any = Message(self.records[found])
        return FoundRecord(found, message)


def record_of(made: Chunk, offset: int, value: bytes | None = None) -> Record:
    headers = {"content-type": trace.CONTENT_TYPE, "schema": trace.SCHEMA_ID, "rows": str(len(made.verify_steps))}
    content = encode(made) if value is None else value
    named = tuple((name, text.encode()) for name, text in headers.items())
    return Record(TOPIC, 0, offset, NOW_US, made.envelope.request.encode(), content, named)


def records(numbers: range) -> dict[int, Record]:
    """Return a record for each offset from 0 on. Those of other numbers are others."""
    made = (chunk(number, np.random.default_rng(number)) for number in numbers)
    return {offset: record_of(one, offset) for offset, one in enumerate(made)}


def write(tables: DeltaLog, written: Mapping[int, Record], hole: range = range(0)) -> None:
    rows = build(written.values(), 8).rows
    last = hole.stop - 1 if hole else max(written)
    batch = Batch(SourcePartition(TOPIC, 0), last, {name: rows[name] for name in COMMIT_ORDER}, (hole,) if hole else ())
    OffsetCommitter(tables).commit([batch])


def settled(tables: DeltaLog, log: Any) -> TopicLog:
    return settle(TOPIC, tables, log, log, NOW_US)


@pytest.fixture
def tables(tmp_path: Path) -> DeltaLog:
    log = DeltaLog(Tables(uri=str(tmp_path / "tables")))
    log.create()
    return log


@pytest.mark.parametrize(
    ("newest", "evidence", "number"),
    [
        (None, Evidence.EMPTY, 1),
        (None, Evidence.SAME, 1),
        (None, Evidence.UNKNOWN, 1),
        (None, Evidence.OTHER, 2),
        (1, Evidence.EMPTY, 1),
        (3, Evidence.SAME, 3),
        (3, Evidence.UNKNOWN, 4),
        (3, Evidence.OTHER, 4),
    ],
)
def test_number_of_a_log_with_an_unknown_id(newest: int | None, evidence: Evidence, number: int) -> None:
    assert choose_number(newest, evidence) == number


def test_first_log_has_the_name_of_the_topic_and_later_ones_a_number() -> None:
    assert [log_name(TOPIC, number) for number in (1, 2)] == ["traces", "traces@2"]
    assert [SourcePartition(log_name(TOPIC, number), 0).broker_topic for number in (1, 2)] == [TOPIC, TOPIC]


def test_log_is_recorded_once_and_found_again_by_its_id(tables: DeltaLog) -> None:
    log = Log("first", {})
    assert settled(tables, log) == TopicLog(TOPIC, 1, "first")
    version = tables.version("dead_letters")
    assert settled(tables, log) == TopicLog(TOPIC, 1, "first")
    assert tables.version("dead_letters") == version
    assert tables.row_count("dead_letters") == 0


def test_recreated_topic_gets_the_next_number_and_a_row_where_the_old_log_ends(tables: DeltaLog) -> None:
    settled(tables, Log("first", {}))
    write(tables, records(range(5)))
    recreated = Log("second", records(range(50, 70)))
    assert settled(tables, recreated) == TopicLog(TOPIC, 2, "second")
    assert settled(tables, recreated) == TopicLog(TOPIC, 2, "second")
    assert recreated.reads == [4]
    (row,) = tables.read("dead_letters").to_pylist()
    assert (row["topic"], row["partition"], row["offset"], row["reason"]) == (TOPIC, 0, 5, TOPIC_RECREATED)
    assert "(id second) under traces@2" in row["detail"]
    assert read_newest(tables, TOPIC).name == "traces@2"
    # A worker that is configured for the first cluster again continues its log.
    assert settled(tables, Log("first", records(range(5)))).number == 1


def test_recreated_topic_that_is_still_shorter_than_the_tables_is_another_log(tables: DeltaLog) -> None:
    settled(tables, Log("first", {}))
    write(tables, records(range(5)))
    assert settled(tables, Log("second", records(range(50, 52)))).number == 2


def test_topic_that_was_recreated_before_it_had_records_keeps_its_number(tables: DeltaLog) -> None:
    settled(tables, Log("first", {}))
    assert settled(tables, Log("second", records(range(3)))).number == 1
    assert tables.row_count("dead_letters") == 0


def test_copy_of_a_topic_keeps_its_number(tables: DeltaLog) -> None:
    settled(tables, Log("first", {}))
    write(tables, records(range(5)))
    assert settled(tables, Log("copy", records(range(9)))) == TopicLog(TOPIC, 1, "copy")
    assert tables.row_count("dead_letters") == 0


def test_another_id_without_the_last_record_is_another_log(tables: DeltaLog) -> None:
    settled(tables, Log("first", {}))
    write(tables, records(range(5)))
    assert settled(tables, Log("second", {7: records(range(9))[7]}, start=7)).number == 2


@pytest.mark.parametrize(
    ("numbers", "start", "number"), [(range(9), 0, 1), (range(50, 59), 0, 2), (range(50, 59), 6, 1)]
)
def test_tables_of_an_older_release_are_judged_by_their_last_record(
    tables: DeltaLog, numbers: range, start: int, number: int
) -> None:
    write(tables, records(range(5)))
    kept = {offset: record for offset, record in records(numbers).items() if offset >= start}
    assert settled(tables, Log("any", kept, start=start)).number == number


@pytest.mark.parametrize("same", [True, False])
def test_dead_letter_is_compared_by_its_bytes(tables: DeltaLog, same: bool) -> None:
    settled(tables, Log("first", {}))
    made = chunk(2, np.random.default_rng(2))
    written = {**records(range(2)), 2: record_of(made, 2, b"not a chunk")}
    write(tables, written)
    found = written if same else {**written, 2: record_of(made, 2, b"not the same bytes")}
    assert settled(tables, Log("other", found)).number == (1 if same else 2)


def test_last_record_before_a_hole_is_compared(tables: DeltaLog) -> None:
    settled(tables, Log("first", {}))
    write(tables, records(range(5)), range(5, 8))
    assert tables.read("dead_letters")["reason"].to_pylist() == [HOLE]
    log = Log("copy", {**records(range(5)), 9: records(range(10))[9]})
    assert settled(tables, log).number == 1
    assert log.reads == [4]


def test_claim_check_is_compared_without_its_file(tables: DeltaLog, tmp_path: Path) -> None:
    store = ClaimStore(Traces(claim_check_uri=str(tmp_path / "claims")))
    made = claimed_chunks(range(3), store)
    written = {offset: record_of(one, offset) for offset, one in enumerate(made)}
    rows = build(written.values(), 8, store.get).rows
    OffsetCommitter(tables).commit([Batch(SourcePartition(TOPIC, 0), 2, {name: rows[name] for name in COMMIT_ORDER})])
    assert settled(tables, Log("any", written)).number == 1
    assert settled(tables, Log("other", records(range(50, 59)))).number == 2


def test_two_workers_that_start_at_once_agree_and_record_one_log(tables: DeltaLog, tmp_path: Path) -> None:
    settled(tables, Log("first", {}))
    write(tables, records(range(5)))
    other = DeltaLog(Tables(uri=str(tmp_path / "tables")))
    recreated = Log("second", records(range(50, 70)))
    meanwhile: list[TopicLog] = []

    def settle_first() -> None:
        recreated.before_read = nothing
        meanwhile.append(settled(other, recreated))

    recreated.before_read = settle_first
    assert [settled(tables, recreated), *meanwhile] == [TopicLog(TOPIC, 2, "second")] * 2
    assert tables.row_count("dead_letters") == 1


def test_broker_without_ids_reads_the_newest_log_until_a_person_begins_another(tables: DeltaLog) -> None:
    write(tables, records(range(5)))
    log: Any = Log(None, records(range(50, 70)))
    assert settled(tables, log) == TopicLog(TOPIC, 1, None)
    assert begin(TOPIC, tables, log, NOW_US, "declared by ann: cut").name == "traces@2"
    assert settled(tables, log) == TopicLog(TOPIC, 2, None)
    (row,) = tables.read("dead_letters").to_pylist()
    assert row["detail"].startswith("declared by ann: cut: ")


def test_another_id_while_a_worker_runs_ends_it() -> None:
    TopicLog(TOPIC, 1, "first").check_id("first")
    with pytest.raises(TopicRecreatedError, match="deleted and created anew"):
        TopicLog(TOPIC, 1, "first").check_id("second")
