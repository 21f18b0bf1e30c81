"""``aurora corpus``: a topic refilled from the tables has what nodes published, and nodes read it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from confluent_kafka.admin import AdminClient, NewTopic
from recorded import LINE, conversation, record_of, tables_of
from serving_node import eventually
from typer.testing import CliRunner

from ops.cli.main import app
from pipeline.delta import DeltaLog
from schemas.answers import Answer
from schemas.settings import Kafka, Serve, Tables
from serving.answers.answer_consumer import AnswerConsumer

COUNT = 1200
PROMPT, LENGTH = 4, 11


@pytest.fixture
def kafka(broker: str) -> Kafka:
    return Kafka(bootstrap_servers=broker, answers_topic=f"answers-{uuid.uuid4().hex}")


@pytest.fixture
def topic(kafka: Kafka) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    admin.create_topics([NewTopic(kafka.answers_topic, 2, 1)])[kafka.answers_topic].result(10)


@pytest.fixture
def aurora(kafka: Kafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("AURORA_TABLES__URI", str(tmp_path))
    monkeypatch.setenv("AURORA_KAFKA__BOOTSTRAP_SERVERS", kafka.bootstrap_servers)
    monkeypatch.setenv("AURORA_KAFKA__ANSWERS_TOPIC", kafka.answers_topic)
    monkeypatch.setenv("AURORA_SERVE__SUFFIX_SCOPE", "fleet")
    return lambda *arguments: CliRunner().invoke(app, ["corpus", *arguments])


def write_requests(folder: Path) -> None:
    """Write requests that ended one after the other, the last one now."""
    now_us, tables = time.time_ns() // 1000, DeltaLog(Tables(uri=str(folder)))
    records = []
    for number in range(COUNT):
        time_us = now_us - (COUNT - number) * 1_000_000
        tokens = [number % 50, *range(100, 100 + LENGTH)]
        steps = [replace(step, time_us=time_us) for step in conversation(tokens, PROMPT)]
        record = record_of(f"r-{number}", steps, offset=number, finish="stop")
        records.append(replace(record, time_us=time_us))
    for name, rows in tables_of(*records).items():
        if rows.num_rows:
            tables.append(name, rows)


@pytest.fixture
def learned(kafka: Kafka, topic: None) -> Iterator[list[Answer]]:
    """What a node reads from the topic."""
    answers: list[Answer] = []
    consumer = AnswerConsumer(kafka, Serve(node="reader", suffix_scope="fleet"), answers.extend)
    consumer.start(LINE, 1000)
    yield answers
    consumer.stop()


def test_a_rebuilt_topic_is_described_and_read(
    aurora: Callable[..., Result], tmp_path: Path, learned: list[Answer]
) -> None:
    write_requests(tmp_path)
    rebuilt = aurora("rebuild", "--from", "1h", "--json")
    assert rebuilt.exit_code == 0, rebuilt.output
    counts = json.loads(rebuilt.stdout)
    assert (counts["requests"], counts["published"], counts["incomplete"]) == (COUNT, COUNT, 0)
    assert f"{COUNT} of {COUNT} answers published" in rebuilt.stderr
    stats = json.loads(aurora("stats", "--json").stdout)
    assert (stats["answers"], stats["tokens"], stats["bytes"]) == (COUNT, counts["tokens"], counts["record_bytes"])
    assert stats["bytes_per_token"] == stats["bytes"] / stats["tokens"]
    assert stats["corrupt"] == 0
    assert stats["lines"] == [{"line": LINE, "tokens": stats["tokens"]}]
    eventually(lambda: len(learned) == COUNT, 10)
    assert {answer.request for answer in learned} == {f"r-{number}" for number in range(COUNT)}
    assert "min ago" in aurora("stats").stdout


def test_errors_name_the_setting(aurora: Callable[..., Result], tmp_path: Path, kafka: Kafka) -> None:
    missing = aurora("stats")
    assert (missing.exit_code, "aurora topics apply" in missing.stderr) == (2, True)
    without = aurora("rebuild", "--set", "tables.uri=/nowhere")
    assert (without.exit_code, "tables.uri" in without.stderr) == (2, True)
    write_requests(tmp_path)
    undelivered = aurora("rebuild", "--set", 'kafka.client_options={"message.timeout.ms": "2000"}')
    assert (undelivered.exit_code, "kafka.answers_topic" in undelivered.stderr) == (2, True), undelivered.output
