"""Tests of the declared topics and of their comparison with the broker."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.broker import TopicError
from pipeline.topics import SETTING_OF, Topic, check_traces_topic, declare_topics, diff_topic
from schemas.answers import MAX_RECORD_BYTES
from schemas.settings import Kafka

TRACES, SPECULATORS, ANSWERS, DRIFT, LAG = declare_topics(Kafka(partitions=4, replication_factor=3))


def with_config(topic: Topic, **changed: str) -> Topic:
    return replace(topic, config={**topic.config, **{key.replace("_", "."): value for key, value in changed.items()}})


def test_traces_topic_expires_is_not_compacted_and_has_broker_timestamps() -> None:
    assert TRACES.config["cleanup.policy"] == "delete"
    assert TRACES.config["message.timestamp.type"] == "LogAppendTime"
    assert SPECULATORS.config["cleanup.policy"] == "compact"
    assert "retention.ms" not in SPECULATORS.config


def test_answers_topic_expires_and_accepts_the_largest_record() -> None:
    assert ANSWERS.config["cleanup.policy"] == "delete"
    assert ANSWERS.config["retention.ms"] == TRACES.config["retention.ms"]
    assert int(ANSWERS.config["max.message.bytes"]) > MAX_RECORD_BYTES


@pytest.mark.parametrize(("replication", "in_sync"), [(1, "1"), (2, "1"), (3, "2"), (5, "3")])
def test_acknowledged_record_survives_the_loss_of_a_minority_of_replicas(replication: int, in_sync: str) -> None:
    for topic in declare_topics(Kafka(replication_factor=replication)):
        assert topic.config["min.insync.replicas"] == in_sync
        assert topic.config["unclean.leader.election.enable"] == "false"


@pytest.mark.parametrize("topic", [TRACES, SPECULATORS, ANSWERS, DRIFT, LAG])
def test_topic_equal_to_its_declaration_needs_no_change(topic: Topic) -> None:
    assert diff_topic(topic, topic) == []


def test_missing_topic_has_a_change_for_every_declared_property() -> None:
    changes = diff_topic(TRACES, None)
    assert {c.property: c.declared for c in changes} == {"partitions": "4", "replication": "3", **TRACES.config}
    assert all(c.found is None and c.rejected is None for c in changes)


def test_undeclared_keys_are_not_changed() -> None:
    assert diff_topic(TRACES, with_config(TRACES, segment_bytes="7")) == []


def test_partitions_can_be_added_with_a_note_and_never_removed() -> None:
    (grown,) = diff_topic(TRACES, replace(TRACES, partitions=2))
    assert (grown.found, grown.declared, grown.rejected) == ("2", "4", None)
    assert "keys go to other partitions" in (grown.note or "")
    (shrunk,) = diff_topic(TRACES, replace(TRACES, partitions=8))
    assert "set kafka.partitions = 8" in (shrunk.rejected or "")


def test_event_topics_may_have_more_partitions_than_declared() -> None:
    assert diff_topic(DRIFT, replace(DRIFT, partitions=3)) == []


def test_replication_change_is_rejected_with_instructions() -> None:
    (change,) = diff_topic(TRACES, replace(TRACES, replication=1))
    assert "kafka-reassign-partitions" in (change.rejected or "")
    assert "kafka.replication_factor = 1" in (change.rejected or "")


def test_compacted_traces_topic_cannot_be_repaired_by_another_policy() -> None:
    (change,) = diff_topic(TRACES, with_config(TRACES, cleanup_policy="compact,delete"))
    assert "kafka.traces_topic" in (change.rejected or "")


@given(st.dictionaries(st.sampled_from(sorted(TRACES.config)), st.sampled_from(["0", "7", "true"])))
def test_no_change_is_left_after_all_changes(other: dict[str, str]) -> None:
    found = replace(TRACES, config={**TRACES.config, **other})
    made = {c.property: c.declared for c in diff_topic(TRACES, found)}
    assert diff_topic(TRACES, replace(found, config={**found.config, **made})) == []


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (with_config(TRACES, cleanup_policy="compact"), "compacted"),
        (with_config(TRACES, max_message_bytes="500000"), r"aurora topics apply.*kafka\.max_message_bytes to 483616"),
        (with_config(TRACES, message_timestamp_type="CreateTime"), "aurora topics apply"),
    ],
)
def test_start_rejects_a_traces_topic_that_loses_records_or_uses_node_timestamps(found: Topic, message: str) -> None:
    with pytest.raises(TopicError, match=message):
        check_traces_topic(found, Kafka())


def test_start_accepts_a_suitable_traces_topic_that_differs_from_its_declaration() -> None:
    check_traces_topic(with_config(TRACES, retention_ms="1", max_message_bytes="9000000"), Kafka())


def test_every_property_names_an_existing_setting() -> None:
    for setting in SETTING_OF.values():
        assert setting.removeprefix("kafka.") in Kafka.model_fields
