"""What a topic has to become, judged from what it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.broker import TopicError
from pipeline.topics import SETTING_OF, Topic, check_traces_topic, declare_topics, diff_topic
from schemas.settings import Kafka

TRACES, SPECULATORS, DRIFT = declare_topics(Kafka(partitions=4, replication_factor=3))


def with_config(topic: Topic, **changed: str) -> Topic:
    return replace(topic, config={**topic.config, **{key.replace("_", "."): value for key, value in changed.items()}})


def test_traces_expire_are_never_compacted_and_carry_the_brokers_time() -> None:
    assert TRACES.config["cleanup.policy"] == "delete"
    assert TRACES.config["message.timestamp.type"] == "LogAppendTime"
    assert SPECULATORS.config["cleanup.policy"] == "compact"
    assert "retention.ms" not in SPECULATORS.config


@pytest.mark.parametrize(("replication", "in_sync"), [(1, "1"), (2, "1"), (3, "2"), (5, "3")])
def test_an_acknowledged_record_survives_the_loss_of_a_minority(replication: int, in_sync: str) -> None:
    for topic in declare_topics(Kafka(replication_factor=replication)):
        assert topic.config["min.insync.replicas"] == in_sync
        assert topic.config["unclean.leader.election.enable"] == "false"


@pytest.mark.parametrize("topic", [TRACES, SPECULATORS, DRIFT])
def test_a_topic_as_it_is_declared_needs_no_change(topic: Topic) -> None:
    assert diff_topic(topic, topic) == []


def test_a_missing_topic_is_shown_with_everything_that_is_declared() -> None:
    changes = diff_topic(TRACES, None)
    assert {c.property: c.declared for c in changes} == {"partitions": "4", "replication": "3", **TRACES.config}
    assert all(c.found is None and c.rejected is None for c in changes)


def test_keys_that_are_not_declared_are_left_alone() -> None:
    assert diff_topic(TRACES, with_config(TRACES, segment_bytes="7")) == []


def test_partitions_grow_with_a_word_about_keys_and_never_shrink() -> None:
    (grown,) = diff_topic(TRACES, replace(TRACES, partitions=2))
    assert (grown.found, grown.declared, grown.rejected) == ("2", "4", None)
    assert "keys go to other partitions" in (grown.note or "")
    (shrunk,) = diff_topic(TRACES, replace(TRACES, partitions=8))
    assert "set kafka.partitions = 8" in (shrunk.rejected or "")


def test_events_may_have_more_partitions_than_they_need() -> None:
    assert diff_topic(DRIFT, replace(DRIFT, partitions=3)) == []


def test_another_replication_is_refused_with_the_way_to_change_it() -> None:
    (change,) = diff_topic(TRACES, replace(TRACES, replication=1))
    assert "kafka-reassign-partitions" in (change.rejected or "")
    assert "kafka.replication_factor = 1" in (change.rejected or "")


def test_a_compacted_traces_topic_is_not_made_good_by_another_policy() -> None:
    (change,) = diff_topic(TRACES, with_config(TRACES, cleanup_policy="compact,delete"))
    assert "kafka.traces_topic" in (change.rejected or "")


@given(st.dictionaries(st.sampled_from(sorted(TRACES.config)), st.sampled_from(["0", "7", "true"])))
def test_after_the_changes_nothing_is_left_to_change(other: dict[str, str]) -> None:
    found = replace(TRACES, config={**TRACES.config, **other})
    made = {c.property: c.declared for c in diff_topic(TRACES, found)}
    assert diff_topic(TRACES, replace(found, config={**found.config, **made})) == []


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (with_config(TRACES, cleanup_policy="compact"), "compacted"),
        (with_config(TRACES, max_message_bytes="500000"), r"aurora topics apply.*kafka\.max_message_bytes to 483616"),
        (with_config(TRACES, message_timestamp_type="CreateTime"), "aurora topics apply"),
    ],
)
def test_a_start_refuses_a_traces_topic_that_would_lose_records_or_trust_a_nodes_clock(found: Topic, told: str) -> None:
    with pytest.raises(TopicError, match=told):
        check_traces_topic(found, Kafka())


def test_a_start_takes_a_traces_topic_that_is_merely_other_than_declared() -> None:
    check_traces_topic(with_config(TRACES, retention_ms="1", max_message_bytes="9000000"), Kafka())


def test_every_declared_choice_names_a_setting_that_exists() -> None:
    for setting in SETTING_OF.values():
        assert setting.removeprefix("kafka.") in Kafka.model_fields
