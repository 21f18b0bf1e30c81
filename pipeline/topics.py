"""The Kafka topics: what they have to be, compared with what the broker has, and brought in line with it.

A process that starts makes the topics that are missing and refuses a traces topic that would lose records; all else is
left to ``aurora topics apply``, because to change a topic that others use is for a person to decide.
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

from pipeline.kafka_admin import TIMEOUT_S, TopicError, connect
from schemas.settings import Kafka

log = structlog.get_logger()

HEADROOM_BYTES = 16 << 10
"""What a message may weigh beside its value: key, headers and the framing of its batch."""
PARTITIONS, REPLICATION = "partitions", "replication"
SETTING_OF = {
    PARTITIONS: "kafka.partitions",
    REPLICATION: "kafka.replication_factor",
    "min.insync.replicas": "kafka.replication_factor",
    "retention.ms": "kafka.retention",
    "max.message.bytes": "kafka.max_message_bytes",
}
"""Where what a topic has to be comes from; for all else there is no choice."""
_BLAMED = {
    KafkaError.INVALID_REPLICATION_FACTOR: "kafka.replication_factor",
    KafkaError.INVALID_PARTITIONS: "kafka.partitions",
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "the rights of the user in kafka.client_options",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "the rights of the user in kafka.client_options",
    KafkaError.POLICY_VIOLATION: "kafka.partitions, replication_factor, retention or max_message_bytes",
}


@dataclass(frozen=True, slots=True)
class Topic:
    """What a topic has to be, or what it is."""

    name: str
    partitions: int
    replication: int
    config: Mapping[str, str]
    at_least: bool = False
    """Whether more partitions are as good."""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that a topic has to become; for a topic that is missing, there is one for each of its properties."""

    topic: str
    what: str
    """``partitions``, ``replication`` or a key of the topic's configuration."""
    found: str | None
    """None where the topic is missing."""
    wanted: str
    refused: str | None = None
    """Why it cannot be done, and what to do instead."""
    note: str | None = None
    """What else it brings about."""


def declared(settings: Kafka) -> list[Topic]:
    """Every topic, as it has to be.

    Traces expire and are never compacted, so that offsets have no holes. Their records carry the broker's time: a node
    whose clock is wrong moves neither retention nor the day that rows are filed under. Of moves of aliases the newest
    are kept; events of drift expire.
    """
    safe = {
        "min.insync.replicas": str((settings.replication_factor + 1) // 2),
        "unclean.leader.election.enable": "false",
    }
    expiring = {"cleanup.policy": "delete", "retention.ms": str(round(settings.retention * 1000)), **safe}
    traces = {
        **expiring,
        "max.message.bytes": str(settings.max_message_bytes + HEADROOM_BYTES),
        "message.timestamp.type": "LogAppendTime",
    }
    return [
        Topic(settings.traces_topic, settings.partitions, settings.replication_factor, traces),
        Topic(
            settings.speculators_topic,
            1,
            settings.replication_factor,
            {"cleanup.policy": "compact", **safe},
            at_least=True,
        ),
        Topic(settings.drift_topic, 1, settings.replication_factor, expiring, at_least=True),
    ]


def differences(wanted: Topic, found: Topic | None) -> list[Change]:
    """What has to change for a topic to become as it is declared; keys that are not declared are left as they are."""
    if found is None:
        properties = {PARTITIONS: str(wanted.partitions), REPLICATION: str(wanted.replication), **wanted.config}
        return [Change(wanted.name, what, None, value) for what, value in properties.items()]
    changes = []
    if wanted.partitions != found.partitions and not (wanted.at_least and wanted.partitions < found.partitions):
        changes.append(_other_partitions(wanted, found))
    if wanted.replication != found.replication:
        to_do = (
            f"Kafka moves copies between brokers only by kafka-reassign-partitions: do that, or set "
            f"kafka.replication_factor = {found.replication}"
        )
        changes.append(Change(wanted.name, REPLICATION, str(found.replication), str(wanted.replication), to_do))
    for key, value in wanted.config.items():
        is_now = found.config.get(key, "")
        if is_now != value:
            holes = key == "cleanup.policy" and "compact" in is_now
            changes.append(Change(wanted.name, key, is_now, value, _holes(wanted.name) if holes else None))
    return changes


def compare(settings: Kafka) -> list[Change]:
    """What the broker lacks; empty when every topic is as it is declared.

    Raises:
        TopicError: the broker does not answer, or does not show its topics.
    """
    admin, wanted = connect(settings), declared(settings)
    found = _found(admin, wanted)
    return [change for topic in wanted for change in differences(topic, found.get(topic.name))]


def apply(settings: Kafka, changes: Sequence[Change], *, dry_run: bool = False) -> None:
    """Make the changes that ``compare`` found, after the broker has checked all of them; none where one is refused.

    Raises:
        TopicError: a change cannot be made, or the broker refuses it; with the setting that it comes from.
    """
    if refused := [change for change in changes if change.refused]:
        raise TopicError("; ".join(f"topic {c.topic}: {c.what} is {c.found}: {c.refused}" for c in refused))
    admin = connect(settings)
    topics = {topic.name: topic for topic in declared(settings)}
    for validate_only in [True] if dry_run else [True, False]:
        _carry_out(admin, changes, topics, validate_only=validate_only)


def create(settings: Kafka, timeout_s: float = TIMEOUT_S) -> None:
    """Make sure that the topics exist, and that the traces topic loses nothing of what is sent to it.

    Raises:
        TopicError: the broker does not answer, refuses, or has a topic of that name that does not fit.
    """
    admin, wanted = connect(settings, timeout_s), declared(settings)
    found = _found(admin, wanted)
    missing = [topic for topic in wanted if topic.name not in found]
    for name, made in _create(admin, missing, validate_only=False).items():
        _done(f"topic {name}", made)
        log.info("topic_created", topic=name)
    if settings.traces_topic in found:
        check_traces(found[settings.traces_topic], settings)


def check_traces(found: Topic, settings: Kafka) -> None:
    """Refuse a traces topic in which records could be lost unseen, or which does not take them.

    Raises:
        TopicError: with what is wrong and what to do.
    """
    if "compact" in found.config["cleanup.policy"]:
        raise TopicError(f"topic {found.name} is compacted: {_holes(found.name)}")
    limit = int(found.config["max.message.bytes"])
    needed = settings.max_message_bytes + HEADROOM_BYTES
    if limit < needed:
        raise TopicError(
            f"topic {found.name} takes messages of at most {limit} bytes, {needed} are needed: `aurora topics apply` "
            f"raises max.message.bytes, or lower kafka.max_message_bytes to {max(limit - HEADROOM_BYTES, 0)}"
        )
    if found.config["message.timestamp.type"] != "LogAppendTime":
        raise TopicError(
            f"topic {found.name} keeps the nodes' time stamps, so that one wrong clock upsets its retention and the "
            f"day that rows are filed under: `aurora topics apply` sets message.timestamp.type to LogAppendTime"
        )


def _other_partitions(wanted: Topic, found: Topic) -> Change:
    refused = note = None
    if wanted.partitions < found.partitions:
        refused = f"Kafka takes no partition away from a topic; set kafka.partitions = {found.partitions}"
    else:
        note = (
            "keys go to other partitions from then on: requests that run meanwhile are split over two, which loses and "
            "doubles no row; stream workers take the new partitions up within five minutes, or when they start"
        )
    return Change(wanted.name, PARTITIONS, str(found.partitions), str(wanted.partitions), refused, note)


def _holes(name: str) -> str:
    return (
        f"its offsets have holes, and records could be lost unseen; set kafka.traces_topic to another name, or delete "
        f"{name} if nothing in it is needed"
    )


def _found(admin: AdminClient, wanted: Sequence[Topic]) -> dict[str, Topic]:
    """Those of the wanted topics that exist, with the keys of their configuration that are declared."""
    try:
        known = admin.list_topics(timeout=TIMEOUT_S).topics
        there = [topic for topic in wanted if topic.name in known and known[topic.name].error is None]
        resources = {topic.name: ConfigResource(ConfigResource.Type.TOPIC, topic.name) for topic in there}
        described = admin.describe_configs(list(resources.values()), request_timeout=TIMEOUT_S) if resources else {}
        entries = {topic.name: described[resources[topic.name]].result() for topic in there}
    except KafkaException as error:
        raise TopicError(
            f"the broker does not show its topics: {error.args[0].str()}; "
            "check the rights of the user in kafka.client_options"
        ) from error
    return {
        topic.name: Topic(
            topic.name,
            len(partitions := known[topic.name].partitions),
            min(len(partition.replicas) for partition in partitions.values()),
            {key: entries[topic.name][key].value or "" for key in topic.config},
        )
        for topic in there
    }


def _carry_out(
    admin: AdminClient, changes: Sequence[Change], topics: Mapping[str, Topic], *, validate_only: bool
) -> None:
    missing = {change.topic for change in changes if change.found is None}
    for name, made in _create(admin, [topics[name] for name in missing], validate_only=validate_only).items():
        _done(f"topic {name}", made)
    there = [change for change in changes if change.found is not None]
    growing = [NewPartitions(change.topic, int(change.wanted)) for change in there if change.what == PARTITIONS]
    if growing:
        for name, grown in admin.create_partitions(growing, validate_only=validate_only).items():
            _done(f"more partitions of topic {name}", grown)
    for name in dict.fromkeys(change.topic for change in there):
        keys = {c.what: c.wanted for c in there if c.topic == name and c.what in topics[name].config}
        if keys:
            _alter(admin, name, keys, validate_only=validate_only)


def _create(admin: AdminClient, topics: Sequence[Topic], *, validate_only: bool) -> Mapping[str, Future[None]]:
    new = [NewTopic(t.name, t.partitions, t.replication, config=dict(t.config)) for t in topics]
    if not new:
        return {}
    made: Mapping[str, Future[None]] = admin.create_topics(new, request_timeout=TIMEOUT_S, validate_only=validate_only)
    return made


def _alter(admin: AdminClient, name: str, keys: Mapping[str, str], *, validate_only: bool) -> None:
    entries = [ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET) for key, value in keys.items()]
    resource = ConfigResource(ConfigResource.Type.TOPIC, name, incremental_configs=entries)
    for altered in admin.incremental_alter_configs([resource], validate_only=validate_only).values():
        _done(f"the configuration of topic {name}", altered)


def _done(what: str, result: Future[None]) -> None:
    """Wait for the broker.

    Raises:
        TopicError: it refuses, with the setting that it refuses.
    """
    try:
        result.result()
    except KafkaException as error:
        cause = error.args[0]
        if cause.code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return  # another process was faster, with the same declaration
        named = [setting for key, setting in SETTING_OF.items() if key in cause.str() and "." in key]
        blamed = named[0] if named else _BLAMED.get(cause.code(), "kafka.bootstrap_servers and kafka.client_options")
        raise TopicError(f"the broker refused {what}: {cause.str()}; check {blamed}") from error
