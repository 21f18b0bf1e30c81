"""Topics on a real broker: created, changed, rejected, and unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # re-exported without saying so
from typer.testing import CliRunner, Result

from ops.cli.main import app
from pipeline import topics
from pipeline.broker import TopicError
from schemas.settings import Kafka

TOPICS = ("traces_topic", "speculators_topic", "answers_topic", "drift_topic", "lag_topic")


@pytest.fixture
def kafka(broker: str, tmp_path: Path) -> Kafka:
    """Return settings with topics of the test."""
    names = {name: f"{name}-{tmp_path.name}" for name in TOPICS}
    return Kafka(bootstrap_servers=broker, **names)


def aurora(kafka: Kafka, *arguments: str) -> Result:
    values = kafka.model_dump(exclude={"client"})
    flags = [f"--set=kafka.{name}={value}" for name, value in values.items()]
    return CliRunner().invoke(app, ["topics", "apply", *flags, *arguments])


def changed(result: Result) -> dict[tuple[str, str], tuple[str | None, str]]:
    return {(c["topic"], c["property"]): (c["found"], c["declared"]) for c in json.loads(result.stdout)["changes"]}


def test_apply_creates_missing_topics_and_then_changes_nothing(kafka: Kafka) -> None:
    tried = aurora(kafka, "--dry-run")
    assert "LogAppendTime" in tried.stdout
    assert tried.stderr == "the broker accepts this; nothing was changed\n"
    assert {topic for topic, _ in changed(aurora(kafka, "--json"))} == {
        kafka.traces_topic,
        kafka.speculators_topic,
        kafka.answers_topic,
        kafka.drift_topic,
        kafka.lag_topic,
    }
    again = aurora(kafka, "--json")
    assert (again.exit_code, changed(again), again.stderr) == (0, {}, "nothing to change\n")


def test_apply_changes_declared_properties_only(kafka: Kafka) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    theirs = {"segment.bytes": "2097152", "retention.ms": "1000"}
    admin.create_topics([NewTopic(kafka.traces_topic, 1, 1, config=theirs)])[kafka.traces_topic].result(10)
    with pytest.raises(TopicError, match="aurora topics apply"):
        topics.create(kafka)
    result = aurora(kafka, "--json")
    assert result.exit_code == 0, result.output
    assert "note: keys go to other partitions" in result.stderr
    ours = {what: change for (topic, what), change in changed(result).items() if topic == kafka.traces_topic}
    assert ours == {
        "partitions": ("1", "2"),
        "retention.ms": ("1000", "259200000"),
        "max.message.bytes": ("16777216", "1016384"),
        "message.timestamp.type": ("CreateTime", "LogAppendTime"),
    }
    topics.create(kafka)
    assert topics.compare(kafka) == []
    assert len(admin.list_topics(timeout=10).topics[kafka.traces_topic].partitions) == 2


def test_no_change_is_made_if_one_is_rejected(kafka: Kafka) -> None:
    topics.create(kafka)
    wanted = kafka.model_copy(update={"partitions": 1, "replication_factor": 3, "retention": 3600.0})
    result = aurora(wanted)
    assert result.exit_code == 2
    assert "kafka.partitions = 2" in result.stderr
    assert "kafka.replication_factor = 1" in result.stderr
    too_large = kafka.model_copy(update={"max_message_bytes": 3_000_000_000, "retention": 3600.0})
    for arguments in (["--dry-run"], []):
        result = aurora(too_large, *arguments)
        assert result.exit_code == 2
        assert result.stderr.endswith("check kafka.max_message_bytes\n")
    assert topics.compare(kafka) == []


def test_topic_rejected_by_the_broker_names_its_setting(kafka: Kafka) -> None:
    with pytest.raises(TopicError, match=r"check kafka\.replication_factor"):
        topics.create(kafka.model_copy(update={"replication_factor": 3}))
    with pytest.raises(TopicError, match=r"check kafka\.max_message_bytes"):
        topics.create(kafka.model_copy(update={"max_message_bytes": 3_000_000_000}))


def test_start_rejects_a_compacted_traces_topic(kafka: Kafka) -> None:
    compacted = kafka.model_copy(update={"traces_topic": kafka.speculators_topic})
    topics.create(kafka)
    with pytest.raises(TopicError, match="compacted"):
        topics.create(compacted)


def test_unreachable_broker_names_its_setting(free_port: Callable[[], int]) -> None:
    with pytest.raises(TopicError, match=r"kafka\.bootstrap_servers"):
        topics.create(Kafka(bootstrap_servers=f"127.0.0.1:{free_port()}"), timeout_s=1)
