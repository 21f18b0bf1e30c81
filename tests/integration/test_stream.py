"""The stream worker on a real broker: published records are in the tables, even if the group's offsets are wrong."""

from __future__ import annotations

import signal
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow.compute as pc
import pytest
import raw_batches
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient  # type: ignore[attr-defined]  # re-exported without saying so
from stream_worker import (
    Publisher,
    chunk,
    claimed_chunks,
    offsets_never_read,
    offsets_without_record,
    rows_of_records,
    stream_settings,
    transactional_publisher,
    wait_until,
    worker,
)
from typer.testing import CliRunner

from ops.cli.main import app
from pipeline import topics
from pipeline.batches import Record, build
from pipeline.deduplication import DeduplicationWindow
from pipeline.delta import DeltaLog
from pipeline.offsets import HOLE, LOST_TO_RETENTION, NEVER_READ, SKIPPED, TOPIC_RECREATED
from schemas.claim_store import ClaimStore
from schemas.settings import Settings, Traces, to_environ
from schemas.status import PartitionStatus, StreamStatus
from schemas.trace import record as trace
from schemas.trace.record import Chunk, encode


@dataclass
class Stage:
    """Topic, tables and publisher of a test."""

    settings: Settings
    admin: AdminClient
    publisher: Publisher
    tables: DeltaLog
    log: Path

    def stored(self, records: int) -> bool:
        return wait_until(lambda: rows_of_records(self.tables) >= records, 40)

    def end(self, partition: int) -> int:
        return 1 + max((r.offset for r in self.publisher.ledger.records if r.partition == partition), default=-1)

    def partitions(self) -> range:
        return range(self.settings.kafka.partitions)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.settings.stream.port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def status(self) -> StreamStatus:
        return StreamStatus.model_validate_json(self.get("/status"))

    def delete_topic(self) -> None:
        topic = self.settings.kafka.traces_topic
        self.admin.delete_topics([topic])[topic].result(10)
        assert wait_until(lambda: topic not in self.admin.list_topics(timeout=10).topics, 20)

    def recreate_topic(self) -> list[Record]:
        """Delete the topic, create it anew, and return the records that it had."""
        self.delete_topic()
        topics.create(self.settings.kafka)
        old, self.publisher = self.publisher.ledger.records, Publisher(self.settings)
        return old

    def assert_equal_to_the_logs(self, old: list[Record]) -> None:
        """Compare the tables with the records of two logs of the topic."""
        name = f"{self.settings.kafka.traces_topic}@2"
        new = [replace(record, topic=name) for record in self.publisher.ledger.records]
        self.publisher.ledger.records = [*old, *new]
        self.assert_equal_to_the_ledger()

    def assert_equal_to_the_ledger(self) -> None:
        records = sorted(self.publisher.ledger.records, key=lambda r: (r.topic, r.partition, r.offset))
        claimed, known = (
            ClaimStore(self.settings.traces).get,
            DeduplicationWindow(self.settings.stream.duplicate_window),
        )
        for name, rows in build(records, self.settings.stream.context_tokens, claimed, known).rows.items():
            order = [("topic", "ascending"), ("partition", "ascending"), ("offset", "ascending")]
            stored = self.tables.read(name).sort_by(order)
            if name == "dead_letters":
                stored = stored.filter(~pc.field("reason").isin(NEVER_READ))
            assert stored.equals(rows), name


@pytest.fixture
def stage(broker: str, tmp_path: Path, free_port: Callable[[], int]) -> Stage:
    settings = stream_settings(broker, tmp_path, free_port())
    topics.create(settings.kafka)
    admin = AdminClient({"bootstrap.servers": broker})
    return Stage(settings, admin, Publisher(settings), DeltaLog(settings.tables), tmp_path / "worker.log")


def test_valid_records_become_rows_and_unusable_ones_dead_letters(stage: Stage) -> None:
    stage.publisher.send_many(range(50))
    foreign = chunk(50, np.random.default_rng(0))
    stage.publisher.send(foreign, b"not a chunk, but long enough")
    stage.publisher.send(foreign, None)
    for _ in range(2):
        stage.publisher.send(foreign, encode(foreign))
    stage.publisher.flush()
    with worker(stage.settings, stage.log) as process:
        assert stage.stored(54), stage.log.read_text()[-5_000:]
        assert wait_until(
            lambda: all(p.next_offset == p.end_offset == stage.end(p.partition) for p in stage.status().partitions), 9
        )
        status, metrics = stage.status(), stage.get("/metrics")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    stage.assert_equal_to_the_ledger()
    assert sorted(stage.tables.read("dead_letters")["reason"].to_pylist()) == ["corrupt", "duplicate", "empty"]
    assert (status.rows_written, sum(status.dead_letters.values())) == (stage.tables.row_count("traces"), 3)
    assert (status.records_lost, status.error) == (0, None)
    assert len(status.partitions) == stage.settings.kafka.partitions
    assert f"aurora_stream_rows_written_total {float(status.rows_written)}" in metrics
    assert 'aurora_stream_dead_letters_total{reason="empty"} 1.0' in metrics


def commit_offsets(consumer: Consumer, ends: list[TopicPartition]) -> bool:
    """Commit offsets. Return False if the new coordinator rejects them."""
    try:
        consumer.commit(offsets=ends, asynchronous=False)
        return [p.offset for p in consumer.committed(ends, timeout=10)] == [p.offset for p in ends]
    except KafkaException:
        return False


def test_group_offset_ahead_of_the_tables_is_ignored(stage: Stage) -> None:
    stage.publisher.send_many(range(40))
    ends = [TopicPartition(stage.settings.kafka.traces_topic, p, stage.end(p)) for p in stage.partitions()]
    consumer = Consumer(
        {"bootstrap.servers": stage.settings.kafka.bootstrap_servers, "group.id": stage.settings.stream.group_id}
    )
    assert wait_until(lambda: commit_offsets(consumer, ends), 30)
    consumer.close()
    with worker(stage.settings, stage.log):
        assert stage.stored(40), stage.log.read_text()[-5_000:]
        stage.publisher.send_many(range(40, 60))
        assert stage.stored(60), stage.log.read_text()[-5_000:]
    stage.assert_equal_to_the_ledger()


def test_group_that_was_reset_does_not_make_a_worker_read_the_topic_again(stage: Stage) -> None:
    stage.publisher.send_many(range(60))
    with worker(stage.settings, stage.log):
        assert stage.stored(60), stage.log.read_text()[-5_000:]
    group = stage.settings.stream.group_id

    def deleted() -> bool:
        try:
            stage.admin.delete_consumer_groups([group])[group].result(10)
        except KafkaException as error:
            return bool(error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND)
        return True

    assert wait_until(deleted, 40)
    with worker(stage.settings, stage.log):
        stage.publisher.send_many(range(60, 80))
        assert stage.stored(80), stage.log.read_text()[-5_000:]
        status = stage.status()
    assert (status.records_skipped, status.records_deferred, status.seeks) == (0, 0, 0)
    stage.assert_equal_to_the_ledger()


def test_records_lost_to_retention_are_counted_and_recorded_as_dead_letters(stage: Stage) -> None:
    stage.publisher.send_many(range(60))
    deleted = {p: stage.end(p) // 2 for p in stage.partitions()}
    starts = [TopicPartition(stage.settings.kafka.traces_topic, p, offset) for p, offset in deleted.items()]
    for done in stage.admin.delete_records(starts).values():
        done.result(10)
    kept = 60 - sum(deleted.values())
    with worker(stage.settings, stage.log):
        assert wait_until(lambda: stage.tables.row_count("accepted") >= kept, 40), stage.log.read_text()[-5_000:]
        assert stage.status().records_lost == sum(deleted.values())
    letters = stage.tables.read("dead_letters").sort_by("partition").to_pylist()
    assert [(row["reason"], row["offset"]) for row in letters] == [(LOST_TO_RETENTION, 0)] * len(letters)
    assert [row["detail"].split(":")[0] for row in letters] == [f"offsets 0 to {end - 1}" for end in deleted.values()]
    offsets = stage.tables.read("accepted", ["partition", "offset"]).to_pylist()
    assert sorted((row["partition"], row["offset"]) for row in offsets) == [
        (p, offset) for p in stage.partitions() for offset in range(deleted[p], stage.end(p))
    ]


UNREACHABLE_PROBE = """
from pipeline import broker, health
def fail(*_):
    raise broker.BrokerUnreachableError("no answer")
broker.RecordProbe.find_record = fail
health.PROGRESS_TIMEOUT_S = 4.0
"""


def test_holes_of_transactions_are_passed_and_recorded_while_traffic_continues(stage: Stage) -> None:
    publisher = transactional_publisher(stage.settings)
    with worker(stage.settings, stage.log) as process:
        for number in range(12):
            with publisher.transaction(abort=number % 3 == 1):
                publisher.send_many(range(10 * number, 10 * number + 6))
            stage.publisher.send_many(range(10 * number + 6, 10 * number + 9))
        stage.publisher.ledger.records += publisher.ledger.records
        records = stage.publisher.ledger.records
        assert stage.stored(len(records)), stage.log.read_text()[-5_000:]
        assert wait_until(lambda: sum(p.lag for p in stage.status().partitions) == 0, 30), stage.status()
        status = stage.status()
        assert process.poll() is None
    expected = offsets_without_record(stage.settings, stage.publisher.ledger)
    assert len(expected) > 24
    assert offsets_never_read(stage.tables, HOLE) == expected
    assert (status.hole_offsets, status.records_lost, status.not_live) == (len(expected), 0, [])
    assert not status.dead_letters
    stage.assert_equal_to_the_ledger()


def test_records_behind_an_open_transaction_wait_and_are_counted_as_lag(stage: Stage) -> None:
    publisher = transactional_publisher(stage.settings)
    stage.publisher.send_many(range(10))
    with worker(stage.settings, stage.log):
        assert stage.stored(10), stage.log.read_text()[-5_000:]
        with publisher.transaction():
            publisher.send_many(range(10, 50))
            stage.publisher.send_many(range(50, 90))
            assert wait_until(lambda: sum(p.lag for p in stage.status().partitions) == 80, 30), stage.status()
            assert wait_until(lambda: all(p.transaction_s > 1 for p in stage.status().partitions), 30)
            assert [p.stalled_s for p in stage.status().partitions] == [0] * len(stage.partitions())
            assert rows_of_records(stage.tables) == 10
        assert stage.stored(90), stage.log.read_text()[-5_000:]
    stage.publisher.ledger.records += publisher.ledger.records
    stage.assert_equal_to_the_ledger()


def test_worker_that_cannot_pass_an_offset_is_not_live_until_a_person_skips_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in to_environ(stage.settings).items():
        monkeypatch.setenv(name, value)
    publisher = transactional_publisher(stage.settings)
    first = chunk(0, np.random.default_rng(0))
    with publisher.transaction():
        publisher.send(first, encode(first))
    stage.publisher.send(first, encode(first), "duplicate")
    stage.publisher.flush()
    (record,) = publisher.ledger.records
    number = 1
    with worker(stage.settings, stage.log, before=UNREACHABLE_PROBE):
        assert stage.stored(1), stage.log.read_text()[-5_000:]

        def not_live_while_traffic_continues() -> bool:
            nonlocal number
            stage.publisher.send_many(range(number, number + 5))
            number += 5
            return any(f"partition {record.partition}:" in problem for problem in stage.status().not_live)

        assert wait_until(not_live_while_traffic_continues, 30), stage.status()
        address = f"{record.topic}/{record.partition}/{record.offset}"
        refused = CliRunner().invoke(app, ["stream", "skip", address, "--why", "a test"])
        assert refused.exit_code == 2
        assert f"the next offset of this partition is {record.offset + 1}" in refused.output
        address = f"{record.topic}/{record.partition}/{record.offset + 1}"
        skipped = CliRunner().invoke(app, ["stream", "skip", address, "--why", "a test"])
        assert skipped.exit_code == 0, skipped.output
        stage.publisher.ledger.records += publisher.ledger.records
        assert stage.stored(len(stage.publisher.ledger.records)), stage.log.read_text()[-5_000:]
        assert wait_until(lambda: not stage.status().not_live, 20), stage.status()
    assert offsets_never_read(stage.tables, SKIPPED) == [(record.partition, record.offset + 1)]
    details = stage.tables.read("dead_letters").filter(pc.field("reason") == SKIPPED)["detail"].to_pylist()
    assert [detail.endswith(": a test") for detail in details] == [True]
    stage.assert_equal_to_the_ledger()


def test_record_with_a_header_name_that_is_not_utf8_is_a_dead_letter_and_those_behind_it_arrive(stage: Stage) -> None:
    made = [chunk(request, np.random.default_rng(request)) for request in range(3)]

    def headers(one: Chunk) -> raw_batches.Headers:
        names = {"content-type": trace.CONTENT_TYPE, "schema": trace.SCHEMA_ID, "rows": str(len(one.verify_steps))}
        names |= {raw_batches.PLACEHOLDER: ""} if one is made[1] else {}
        return [(name, text.encode()) for name, text in names.items()]

    kafka, records = stage.settings.kafka, [(b"key", encode(one), headers(one)) for one in made]
    raw_batches.send(kafka.bootstrap_servers, kafka.traces_topic, 0, records)
    with worker(stage.settings, stage.log) as process:
        assert stage.stored(3), stage.log.read_text()[-5_000:]
        stage.publisher.send_many(range(3, 40))
        assert stage.stored(40), stage.log.read_text()[-5_000:]
        assert process.poll() is None
    (letter,) = stage.tables.read("dead_letters").to_pylist()
    assert (letter["partition"], letter["offset"], letter["reason"]) == (0, 1, "bad_header")
    assert letter["value"] == encode(made[1])
    assert letter["headers"][-1]["name"] == r"\xff\xfe" * 8


PAUSES_ARE_SHORT = """
from pipeline import health
health.PAUSE_RETRY_S = 1.0
health.PROGRESS_TIMEOUT_S = 4.0
"""


def test_record_of_another_major_version_pauses_its_partition_alone_and_is_no_dead_letter(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in to_environ(stage.settings).items():
        monkeypatch.setenv(name, value)
    made = [chunk(request, np.random.default_rng(request)) for request in range(3)]

    def headers(one: Chunk) -> raw_batches.Headers:
        names = {"content-type": trace.CONTENT_TYPE, "rows": str(len(one.verify_steps))}
        names |= {"format": "aurora.trace/4" if one is made[1] else trace.FORMAT}
        return [(name, text.encode()) for name, text in names.items()]

    def of(partition: int) -> PartitionStatus:
        unknown = PartitionStatus(partition=partition, next_offset=-1, end_offset=-1, lag=0, stalled_s=0)
        return next((one for one in stage.status().partitions if one.partition == partition), unknown)

    kafka = stage.settings.kafka
    records = [(b"key", b"of a later release" if one is made[1] else encode(one), headers(one)) for one in made]
    raw_batches.send(kafka.bootstrap_servers, kafka.traces_topic, 0, records)
    with worker(stage.settings, stage.log, before=PAUSES_ARE_SHORT) as process:
        assert stage.stored(1), stage.log.read_text()[-5_000:]
        assert wait_until(lambda: of(0).paused_by == "aurora.trace/4", 40), stage.status()
        stage.publisher.send_many(range(3, 60))
        elsewhere = stage.end(1)
        assert wait_until(lambda: of(1).next_offset == elsewhere, 40), stage.status()
        time.sleep(6)  # longer than a partition may stall, and than a few retries
        status = stage.status()
        assert (of(0).next_offset, of(0).paused_by) == (1, "aurora.trace/4")
        assert (status.not_live, status.dead_letters, stage.tables.row_count("dead_letters")) == ([], {}, 0)
        assert ["aurora.trace/4" in problem for problem in status.not_ready] == [True]
        skipped = CliRunner().invoke(app, ["stream", "skip", "0/1", "--why", "a test"])
        assert skipped.exit_code == 0, skipped.output
        assert wait_until(lambda: sum(p.lag for p in stage.status().partitions) == 0, 40), stage.status()
        assert stage.status().not_ready == []
        assert process.poll() is None
    rows = stage.tables.read("accepted", ["partition", "offset"]).to_pylist()
    assert sorted(row["offset"] for row in rows if row["partition"] == 0) == [
        offset for offset in range(stage.end(0)) if offset != 1
    ]


def test_worker_waits_while_a_table_cannot_be_written(stage: Stage) -> None:
    stage.publisher.send_many(range(20))
    table, away = (Path(stage.settings.tables.uri) / name for name in ("traces", "away"))
    with worker(stage.settings, stage.log) as process:
        assert stage.stored(20), stage.log.read_text()[-5_000:]
        table.rename(away)
        table.write_text("a file where the table was")
        stage.publisher.send_many(range(20, 40))
        assert wait_until(lambda: "tables.uri" in (stage.status().error or ""), 40), stage.log.read_text()[-5_000:]
        assert stage.tables.row_count("accepted") == 20
        table.unlink()
        away.rename(table)
        assert stage.stored(40), stage.log.read_text()[-5_000:]
        assert wait_until(lambda: stage.status().error is None, 20)
        assert process.poll() is None
    stage.assert_equal_to_the_ledger()


def test_claim_checks_wait_for_their_store_and_become_dead_letters_without_their_file(
    stage: Stage, tmp_path: Path
) -> None:
    folder, away = tmp_path / "claims", tmp_path / "away"
    stage.settings = stage.settings.model_copy(update={"traces": Traces(claim_check_uri=str(folder))})
    store = ClaimStore(stage.settings.traces)

    def send(chunks: list[Chunk]) -> None:
        for made in chunks:
            stage.publisher.send(made, encode(made))
        stage.publisher.flush()

    send(claimed_chunks(range(10), store))
    with worker(stage.settings, stage.log):
        assert stage.stored(10), stage.log.read_text()[-5_000:]
        more = claimed_chunks(range(10, 20), store)
        assert more[0].envelope.claim
        Path(urlsplit(more[0].envelope.claim.uri).path).unlink()
        folder.rename(away)
        send(more)
        assert wait_until(lambda: "traces.claim_check_uri" in (stage.status().error or ""), 40), stage.log.read_text()
        assert rows_of_records(stage.tables) == 10
        away.rename(folder)
        assert stage.stored(20), stage.log.read_text()[-5_000:]
        assert wait_until(lambda: stage.status().error is None, 20)
    stage.assert_equal_to_the_ledger()
    assert stage.tables.read("dead_letters")["reason"].to_pylist() == ["claim_missing"]
    assert all(stage.tables.read("accepted")["features"].to_pylist())


def test_topic_created_anew_while_no_worker_runs_is_read_from_its_start(stage: Stage) -> None:
    stage.publisher.send_many(range(40))
    with worker(stage.settings, stage.log):
        assert stage.stored(40), stage.log.read_text()[-5_000:]
    ends = [stage.end(partition) for partition in stage.partitions()]
    old = stage.recreate_topic()
    stage.publisher.send_many(range(100, 200))
    assert all(stage.end(partition) > ends[partition] for partition in stage.partitions())
    with worker(stage.settings, stage.log):
        assert stage.stored(140), stage.log.read_text()[-5_000:]
        assert stage.status().topic_log == 2
        assert stage.status().records_lost == 0
    with worker(stage.settings, stage.log):
        stage.publisher.send_many(range(200, 210))
        assert stage.stored(150), stage.log.read_text()[-5_000:]
        assert stage.status().topic_log == 2
    stage.assert_equal_to_the_logs(old)
    assert stage.log.read_text().count("topic_recreated") == 1
    topic = stage.settings.kafka.traces_topic
    letters = stage.tables.read("dead_letters").sort_by("partition").to_pylist()
    assert [(row["topic"], row["partition"], row["offset"], row["reason"]) for row in letters] == [
        (topic, partition, ends[partition], TOPIC_RECREATED) for partition in stage.partitions()
    ]
    assert all(f"under {topic}@2" in row["detail"] for row in letters)


def test_topic_created_anew_while_a_worker_runs_is_read_from_its_start(stage: Stage) -> None:
    stage.publisher.send_many(range(40))
    with worker(stage.settings, stage.log) as process:
        assert stage.stored(40), stage.log.read_text()[-5_000:]
        old = stage.recreate_topic()
        stage.publisher.send_many(range(100, 200))
        assert process.wait(60) == 1, stage.log.read_text()[-5_000:]
    with worker(stage.settings, stage.log):
        assert stage.stored(140), stage.log.read_text()[-5_000:]
        assert stage.status().topic_log == 2
    stage.assert_equal_to_the_logs(old)


def test_deleted_topic_is_named_by_a_worker_that_lives_on(stage: Stage) -> None:
    stage.publisher.send_many(range(10))
    with worker(stage.settings, stage.log) as process:
        assert stage.stored(10), stage.log.read_text()[-5_000:]
        stage.delete_topic()
        assert wait_until(lambda: "does not exist on the broker" in (stage.status().error or ""), 30), stage.status()
        assert stage.status().not_live == []
        assert any("does not exist" in problem for problem in stage.status().not_ready)
        assert process.poll() is None
    text = stage.log.read_text()
    assert (text.count("topic_missing"), text.count("broker_unreachable")) == (1, 0)


def test_copy_of_the_topic_under_another_id_is_continued_where_the_tables_end(stage: Stage) -> None:
    stage.publisher.send_many(range(40))
    with worker(stage.settings, stage.log):
        assert stage.stored(40), stage.log.read_text()[-5_000:]
    stage.recreate_topic()
    stage.publisher.send_many(range(40))
    stage.publisher.send_many(range(40, 60))
    with worker(stage.settings, stage.log):
        assert stage.stored(60), stage.log.read_text()[-5_000:]
        assert (stage.status().topic_log, stage.status().records_skipped) == (1, 0)
    assert stage.log.read_text().count("topic_id_changed") == 1
    assert stage.tables.row_count("accepted") == 60
    stored = stage.tables.read("accepted", ["topic", "request"])
    assert sorted(stored["request"].to_pylist()) == sorted(f"request-{number}" for number in range(60))
    assert set(stored["topic"].to_pylist()) == {stage.settings.kafka.traces_topic}


BROKER_WITHOUT_TOPIC_IDS = """
from pipeline import broker
describe = broker.Watermarks.describe
broker.Watermarks.describe = lambda *of: describe(*of)._replace(topic_id=None)
"""


def test_log_that_has_other_records_under_the_same_id_is_not_read_until_a_person_declares_it_new(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in to_environ(stage.settings).items():
        monkeypatch.setenv(name, value)
    stage.publisher.send_many(range(40))
    with worker(stage.settings, stage.log, before=BROKER_WITHOUT_TOPIC_IDS):
        assert stage.stored(40), stage.log.read_text()[-5_000:]
    old = stage.recreate_topic()
    stage.publisher.send_many(range(100, 200))
    with worker(stage.settings, stage.log, before=BROKER_WITHOUT_TOPIC_IDS) as process:
        assert process.wait(60) == 1, stage.log.read_text()[-5_000:]
    assert "the broker has another record there than the tables" in stage.log.read_text()
    assert "aurora stream new-log" in stage.log.read_text()
    assert rows_of_records(stage.tables) == 40
    declared = CliRunner().invoke(app, ["stream", "new-log", "--why", "a test"])
    assert declared.exit_code == 0, declared.output
    assert f"{stage.settings.kafka.traces_topic}@2" in declared.output
    with worker(stage.settings, stage.log, before=BROKER_WITHOUT_TOPIC_IDS):
        assert stage.stored(140), stage.log.read_text()[-5_000:]
    stage.assert_equal_to_the_logs(old)


def test_records_deleted_behind_the_next_offset_are_counted_as_lost_in_the_same_log(stage: Stage) -> None:
    stage.publisher.send_many(range(20))
    with worker(stage.settings, stage.log):
        assert stage.stored(20), stage.log.read_text()[-5_000:]
    stored = [stage.end(partition) for partition in stage.partitions()]
    stage.publisher.send_many(range(20, 60))
    starts = [stored[partition] + 5 for partition in stage.partitions()]
    cut = [TopicPartition(stage.settings.kafka.traces_topic, p, start) for p, start in enumerate(starts)]
    for done in stage.admin.delete_records(cut).values():
        done.result(10)
    with worker(stage.settings, stage.log):
        assert stage.stored(60 - 5 * len(starts)), stage.log.read_text()[-5_000:]
        assert (stage.status().topic_log, stage.status().records_lost) == (1, 5 * len(starts))
    lost = [(p, offset) for p in stage.partitions() for offset in range(stored[p], starts[p])]
    assert offsets_never_read(stage.tables, LOST_TO_RETENTION) == lost


def test_compaction_runs_beside_commits_and_fences_none(stage: Stage) -> None:
    often = stage.settings.tables.model_copy(update={"maintenance_interval": 0.1})
    stage.settings = stage.settings.model_copy(update={"tables": often})
    with worker(stage.settings, stage.log):
        for start in range(0, 100, 10):
            stage.publisher.send_many(range(start, start + 10))
            assert stage.stored(start + 10), stage.log.read_text()[-5_000:]
        assert wait_until(lambda: stage.status().maintenance_files.get("compacted", 0) > 10, 40), stage.log.read_text()[
            -5_000:
        ]
        status = stage.status()
    assert (status.commits_fenced, status.table_errors, status.maintenance_files.get("failed", 0)) == (0, 0, 0)
    stage.assert_equal_to_the_ledger()
