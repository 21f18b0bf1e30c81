"""Drift events on a real broker: the acceptance of the traffic falls, and two workers send the event."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import Consumer, TopicPartition
from recorded import conversation, verify_step_of
from stream_worker import Publisher, chunk, rows_of_records, stream_settings, wait_until, worker
from typer.testing import CliRunner

from ops.cli.main import app
from pipeline import topics
from pipeline.delta import DeltaLog
from schemas.events import DriftEvent
from schemas.settings import Settings
from schemas.trace.record import Chunk, encode

BEFORE, AFTER = 600, 400


def request(number: int, acceptance: float, rng: np.random.Generator) -> Chunk:
    """Return a request of eight verify steps that draft one token each."""
    verify_steps, position, root = conversation(range(4), 3)[:1], 3, 3
    for n in range(1, 9):
        tokens = [root, 7] if rng.random() < acceptance else [root]
        root = n
        verify_steps.append(verify_step_of(n, position, tokens, root, [7]))
        position += len(tokens)
    envelope = replace(chunk(0, rng).envelope, request=f"request-{number}", label="sql", feature_width=24, top_k=3)
    return Chunk(envelope, tuple(verify_steps))


def read_all(settings: Settings) -> list[DriftEvent]:
    kafka = settings.kafka
    flags = [
        "--set",
        f"kafka.bootstrap_servers={kafka.bootstrap_servers}",
        "--set",
        f"kafka.drift_topic={kafka.drift_topic}",
    ]
    answer = CliRunner().invoke(app, ["drift", "--json", *flags])
    assert answer.exit_code == 0, answer.output
    return [DriftEvent.model_validate(json.loads(line)) for line in answer.stdout.splitlines()]


def messages(settings: Settings) -> int:
    """Return the number of messages on the topic, duplicates included."""
    consumer = Consumer({"bootstrap.servers": settings.kafka.bootstrap_servers, "group.id": "drift-test"})
    with closing(consumer):
        ends = consumer.get_watermark_offsets(TopicPartition(settings.kafka.drift_topic, 0), timeout=10)
    return ends[1]


def test_fall_of_acceptance_is_reported_by_each_partition_and_by_the_next_worker_alike(
    broker: str, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    settings = stream_settings(broker, tmp_path, free_port())
    topics.create(settings.kafka)
    publisher, tables, log = Publisher(settings), DeltaLog(settings.tables), tmp_path / "worker.log"
    rng, partitions = np.random.default_rng(0), settings.kafka.partitions

    def publish(numbers: range, acceptance: float) -> None:
        for number in numbers:
            made = request(number, acceptance, rng)
            publisher.send(made, encode(made))
        publisher.flush()

    def run_worker(records: int, sent: int) -> None:
        with worker(settings, log) as process:
            assert wait_until(lambda: rows_of_records(tables) >= records, 60), log.read_text()[-5_000:]
            assert wait_until(lambda: messages(settings) == sent, 20), log.read_text()[-5_000:]
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0

    publish(range(BEFORE), 0.8)
    publish(range(BEFORE, BEFORE + AFTER), 0.4)
    run_worker(BEFORE + AFTER, sent=partitions)
    events = read_all(settings)
    assert sorted(event.partition for event in events) == list(range(partitions))
    for event in events:
        assert (event.label, event.speculator, event.direction) == ("sql", "1", "fall")
        assert event.before.first_token_acceptance == pytest.approx(0.8, abs=0.04)
        assert event.before.acceptance_length == 1 + event.before.first_token_acceptance
        assert event.after.first_token_acceptance == pytest.approx(0.4, abs=0.1)
        assert event.before.requests == pytest.approx(BEFORE / partitions, abs=60)
        assert event.before.draft_tokens == event.after.draft_tokens == 1
    # It cannot know whether the worker before sent them, and finds out from the table what they were.
    publish(range(BEFORE + AFTER, BEFORE + AFTER + 40), 0.4)
    run_worker(BEFORE + AFTER + 40, sent=2 * partitions)
    assert read_all(settings) == events
