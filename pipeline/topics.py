"""The Kafka topics: their declaration, its comparison with the broker, and the changes that align the broker with it.

A process that starts creates the topics that are missing and rejects a traces topic that would lose records. All other
changes are left to ``aurora topics apply``, because a person decides about a topic that others use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import structlog
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
)

from pipeline.broker import TIMEOUT_S, TopicError, connect
from schemas.answers import MAX_RECORD_BYTES
from schemas.settings import Kafka

log = structlog.get_logger()

HEADROOM_BYTES = 16 << 10
"""Bytes of a message beside its value: key, headers and the framing of its batch."""
PARTITIONS, REPLICATION = "partitions", "replication"
SETTING_OF = {
    PARTITIONS: "kafka.partitions",
    REPLICATION: "kafka.replication_factor",
    "min.insync.replicas": "kafka.replication_factor",
    "retention.ms": "kafka.retention",
    "max.message.bytes": "kafka.max_message_bytes",
}
"""The setting behind each property of a topic. Other properties cannot be set."""
_SETTING_OF_ERROR = {
    KafkaError.INVALID_REPLICATION_FACTOR: "kafka.replication_factor",
    KafkaError.INVALID_PARTITIONS: "kafka.partitions",
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "the rights of the user in kafka.client_options",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "the rights of the user in kafka.client_options",
    KafkaError.POLICY_VIOLATION: "kafka.partitions, replication_factor, retention or max_message_bytes",
}


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic, as declared or as found on the broker."""

    name: str
    partitions: int
    replication: int
    config: Mapping[str, str]
    more_partitions_allowed: bool = False


@dataclass(frozen=True, slots=True)
class TopicChange:
    """A change of one property of a topic. A missing topic has one change for each of its properties."""

    topic: str
    property: str
    """``partitions``, ``replication`` or a key of the topic's configuration."""
    found: str | None
    """None if the topic is missing."""
    declared: str
    rejected: str | None = None
    """Why the change cannot be made, and what to do instead."""
    note: str | None = None
    """Side effects of the change."""


def declare_topics(settings: Kafka) -> list[Topic]:
    """Return the declaration of every topic.

    The traces topic expires and is never compacted, so that its offsets have no holes. Its records have the broker's
    timestamp: a node whose clock is wrong affects neither retention nor the day in the tables. The speculators topic
    keeps the newest move of each alias. The other topics expire.
    """
    safe = {
        "min.insync.replicas": str((settings.replication_factor + 1) // 2),
        "unclean.leader.election.enable": "false",
    }
    expiring = {"cleanup.policy": "delete", "retention.ms": str(round(settings.retention * 1000)), **safe}
    compacted = {"cleanup.policy": "compact", **safe}
    traces = {
        **expiring,
        "max.message.bytes": str(settings.max_message_bytes + HEADROOM_BYTES),
        "message.timestamp.type": "LogAppendTime",
    }
    answers = {**expiring, "max.message.bytes": str(MAX_RECORD_BYTES + HEADROOM_BYTES)}
    replication = settings.replication_factor
    return [
        Topic(settings.traces_topic, settings.partitions, replication, traces),
        Topic(settings.speculators_topic, 1, replication, compacted, more_partitions_allowed=True),
        Topic(settings.answers_topic, 1, replication, answers, more_partitions_allowed=True),
        Topic(settings.drift_topic, 1, replication, expiring, more_partitions_allowed=True),
        Topic(settings.lag_topic, 1, replication, expiring, more_partitions_allowed=True),
    ]


def diff_topic(declared: Topic, found: Topic | None) -> list[TopicChange]:
    """Return the changes that align a topic with its declaration. Keys that are not declared stay as they are."""
    if found is None:
        properties = {PARTITIONS: str(declared.partitions), REPLICATION: str(declared.replication), **declared.config}
        return [TopicChange(declared.name, name, None, value) for name, value in properties.items()]
    changes = []
    grown = declared.more_partitions_allowed and declared.partitions < found.partitions
    if declared.partitions != found.partitions and not grown:
        changes.append(_change_partitions(declared, found))
    if declared.replication != found.replication:
        to_do = (
            f"Kafka moves replicas between brokers only by kafka-reassign-partitions: run it, or set "
            f"kafka.replication_factor = {found.replication}"
        )
        changes.append(
            TopicChange(declared.name, REPLICATION, str(found.replication), str(declared.replication), to_do)
        )
    for key, value in declared.config.items():
        current = found.config.get(key, "")
        if current != value:
            compacted = key == "cleanup.policy" and "compact" in current
            changes.append(
                TopicChange(declared.name, key, current, value, _holes(declared.name) if compacted else None)
            )
    return changes


def compare(settings: Kafka) -> list[TopicChange]:
    """Return the changes that align the broker with the declaration; empty if it is aligned.

    Raises:
        TopicError: the broker does not answer, or does not list its topics.
    """
    admin, declared = connect(settings), declare_topics(settings)
    found = _describe_topics(admin, declared)
    return [change for topic in declared for change in diff_topic(topic, found.get(topic.name))]


def apply(settings: Kafka, changes: Sequence[TopicChange], *, dry_run: bool = False) -> None:
    """Make the changes of ``compare`` after the broker has validated all of them. If one is rejected, none is made.

    Raises:
        TopicError: a change cannot be made, or the broker rejects it. The message names the setting behind it.
    """
    if rejected := [change for change in changes if change.rejected]:
        raise TopicError("; ".join(f"topic {c.topic}: {c.property} is {c.found}: {c.rejected}" for c in rejected))
    admin = connect(settings)
    topics = {topic.name: topic for topic in declare_topics(settings)}
    for validate_only in [True] if dry_run else [True, False]:
        _make_changes(admin, changes, topics, validate_only=validate_only)


def create(settings: Kafka, timeout_s: float = TIMEOUT_S) -> None:
    """Create the topics that are missing, and check that the traces topic loses no records.

    Raises:
        TopicError: the broker does not answer, rejects a topic, or has an unsuitable one of that name.
    """
    admin, declared = connect(settings, timeout_s), declare_topics(settings)
    found = _describe_topics(admin, declared)
    missing = [topic for topic in declared if topic.name not in found]
    for name, result in _create_topics(admin, missing, validate_only=False).items():
        _await_result(f"topic {name}", result)
        log.info("topic_created", topic=name)
    if settings.traces_topic in found:
        check_traces_topic(found[settings.traces_topic], settings)


def check(settings: Kafka) -> None:
    """Check that the traces topic on the broker loses no records.

    Raises:
        TopicError: the broker does not answer, or the topic is missing or unsuitable.
    """
    found = _describe_topics(connect(settings), declare_topics(settings)[:1])
    if settings.traces_topic not in found:
        raise TopicError(f"topic {settings.traces_topic} is missing on the broker; restart the stream to create it")
    check_traces_topic(found[settings.traces_topic], settings)


def check_traces_topic(found: Topic, settings: Kafka) -> None:
    """Check that no record can be lost unnoticed in a traces topic, and that it accepts all records.

    Raises:
        TopicError: the topic is unsuitable. The message says what to do.
    """
    if "compact" in found.config["cleanup.policy"]:
        raise TopicError(f"topic {found.name} is compacted: {_holes(found.name)}")
    limit = int(found.config["max.message.bytes"])
    needed = settings.max_message_bytes + HEADROOM_BYTES
    if limit < needed:
        raise TopicError(
            f"topic {found.name} accepts messages of at most {limit} bytes, {needed} are needed: `aurora topics apply` "
            f"raises max.message.bytes, or lower kafka.max_message_bytes to {max(limit - HEADROOM_BYTES, 0)}"
        )
    if found.config["message.timestamp.type"] != "LogAppendTime":
        raise TopicError(
            f"topic {found.name} keeps the timestamps of the nodes, so one wrong clock affects its retention and the "
            f"day of its rows: `aurora topics apply` sets message.timestamp.type to LogAppendTime"
        )


def _change_partitions(declared: Topic, found: Topic) -> TopicChange:
    rejected = note = None
    if declared.partitions < found.partitions:
        rejected = f"Kafka cannot remove partitions from a topic; set kafka.partitions = {found.partitions}"
    else:
        note = (
            "keys go to other partitions from then on: a request that runs meanwhile is split over two, which loses "
            "and duplicates no row; stream workers read the new partitions within five minutes, or after a restart"
        )
    return TopicChange(declared.name, PARTITIONS, str(found.partitions), str(declared.partitions), rejected, note)


def _holes(name: str) -> str:
    return (
        f"its offsets have holes, and records could be lost unnoticed; set kafka.traces_topic to another name, or "
        f"delete {name} if nothing in it is needed"
    )


def _describe_topics(admin: AdminClient, declared: Sequence[Topic]) -> dict[str, Topic]:
    """Return the declared topics that exist, with the keys of their configuration that are declared."""
    try:
        known = admin.list_topics(timeout=TIMEOUT_S).topics
        existing = [topic for topic in declared if topic.name in known and known[topic.name].error is None]
        resources = {topic.name: ConfigResource(ConfigResource.Type.TOPIC, topic.name) for topic in existing}
        described = admin.describe_configs(list(resources.values()), request_timeout=TIMEOUT_S) if resources else {}
        entries = {topic.name: described[resources[topic.name]].result() for topic in existing}
    except KafkaException as error:
        raise TopicError(
            f"the broker does not list its topics: {error.args[0].str()}; check the rights of the user in "
            f"kafka.client_options"
        ) from error
    return {
        topic.name: Topic(
            topic.name,
            len(partitions := known[topic.name].partitions),
            min(len(partition.replicas) for partition in partitions.values()),
            {key: entries[topic.name][key].value or "" for key in topic.config},
        )
        for topic in existing
    }


def _make_changes(
    admin: AdminClient, changes: Sequence[TopicChange], topics: Mapping[str, Topic], *, validate_only: bool
) -> None:
    missing = {change.topic for change in changes if change.found is None}
    created = _create_topics(admin, [topics[name] for name in missing], validate_only=validate_only)
    for name, result in created.items():
        _await_result(f"topic {name}", result)
    updates = [change for change in changes if change.found is not None]
    growing = [NewPartitions(change.topic, int(change.declared)) for change in updates if change.property == PARTITIONS]
    if growing:
        for name, result in admin.create_partitions(growing, validate_only=validate_only).items():
            _await_result(f"more partitions of topic {name}", result)
    for name in dict.fromkeys(change.topic for change in updates):
        keys = {c.property: c.declared for c in updates if c.topic == name and c.property in topics[name].config}
        if keys:
            _alter_config(admin, name, keys, validate_only=validate_only)


def _create_topics(admin: AdminClient, topics: Sequence[Topic], *, validate_only: bool) -> Mapping[str, Future[None]]:
    new = [NewTopic(t.name, t.partitions, t.replication, config=dict(t.config)) for t in topics]
    if not new:
        return {}
    created: Mapping[str, Future[None]] = admin.create_topics(
        new, request_timeout=TIMEOUT_S, validate_only=validate_only
    )
    return created


def _alter_config(admin: AdminClient, name: str, keys: Mapping[str, str], *, validate_only: bool) -> None:
    entries = [ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET) for key, value in keys.items()]
    resource = ConfigResource(ConfigResource.Type.TOPIC, name, incremental_configs=entries)
    for result in admin.incremental_alter_configs([resource], validate_only=validate_only).values():
        _await_result(f"the configuration of topic {name}", result)


def _await_result(subject: str, result: Future[None]) -> None:
    """Wait for the broker.

    Raises:
        TopicError: the broker rejects the request. The message names the setting behind it.
    """
    try:
        result.result()
    except KafkaException as error:
        cause = error.args[0]
        if cause.code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return  # another process created it, from the same declaration
        named = [setting for key, setting in SETTING_OF.items() if key in cause.str() and "." in key]
        setting = (
            named[0]
            if named
            else _SETTING_OF_ERROR.get(cause.code(), "kafka.bootstrap_servers and kafka.client_options")
        )
        raise TopicError(f"the broker rejected {subject}: {cause.str()}; check {setting}") from error
