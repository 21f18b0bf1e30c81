"""The Kafka topics, created as the pipeline needs them, and checked where they exist already."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

import structlog
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    ConfigResource,
    NewTopic,
)

from schemas.settings import Kafka

log = structlog.get_logger()

HEADROOM_BYTES = 16 << 10
"""What a message may weigh beside its value: key, headers and the framing of its batch."""
_NAMES = {
    KafkaError.INVALID_REPLICATION_FACTOR: "kafka.replication",
    KafkaError.INVALID_PARTITIONS: "kafka.partitions",
    KafkaError.INVALID_CONFIG: "kafka.max_message_bytes or kafka.retention_hours",
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "kafka.client",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "kafka.client",
    KafkaError.POLICY_VIOLATION: "kafka.partitions, replication, retention_hours or max_message_bytes",
}


class TopicError(RuntimeError):
    """A topic that cannot be created or cannot be used; the message names the setting to change."""


def wanted_topics(settings: Kafka) -> list[NewTopic]:
    """Traces expire and are never compacted, so that offsets have no holes; of events the newest are kept."""
    traces = {
        "cleanup.policy": "delete",
        "retention.ms": str(round(settings.retention_hours * 3_600_000)),
        "max.message.bytes": str(settings.max_message_bytes + HEADROOM_BYTES),
    }
    return [
        NewTopic(settings.traces_topic, settings.partitions, settings.replication, config=traces),
        NewTopic(settings.speculators_topic, 1, settings.replication, config={"cleanup.policy": "compact"}),
    ]


def create(settings: Kafka, timeout_s: float = 15) -> None:
    """Make sure that the topics exist and can hold what is sent to them.

    Raises:
        TopicError: the broker does not answer, refuses, or has a topic of that name that does not fit.
    """
    admin = AdminClient({"bootstrap.servers": settings.bootstrap, **settings.client})
    topics = wanted_topics(settings)
    try:
        admin.list_topics(timeout=timeout_s)
    except KafkaException as error:
        raise TopicError(
            f"no broker answered at {settings.bootstrap} within {timeout_s:g} s ({error.args[0].str()}): "
            f"start one, or point kafka.bootstrap at the one you have (kafka.client for SASL and TLS)"
        ) from error
    for name, created in admin.create_topics(topics, request_timeout=timeout_s).items():
        if _created(name, created):
            log.info("topic_created", topic=name)
        elif name == settings.traces_topic:
            _check_traces(name, _configuration(admin, name, timeout_s), settings)


def _created(name: str, result: Future[None]) -> bool:
    try:
        result.result()
    except KafkaException as error:
        cause = error.args[0]
        if cause.code() == KafkaError.TOPIC_ALREADY_EXISTS:
            return False
        hint = _NAMES.get(cause.code(), "kafka.bootstrap and kafka.client")
        raise TopicError(f"the broker refused topic {name}: {cause.str()}; check {hint}") from error
    return True


def _configuration(admin: AdminClient, name: str, timeout_s: float) -> dict[str, str | None]:
    resource = ConfigResource(ConfigResource.Type.TOPIC, name)
    try:
        entries = admin.describe_configs([resource], request_timeout=timeout_s)[resource].result()
    except KafkaException as error:
        raise TopicError(
            f"the settings of topic {name} cannot be read: {error.args[0].str()}; check kafka.client"
        ) from error
    return {key: entry.value for key, entry in entries.items()}


def _check_traces(name: str, found: Mapping[str, str | None], settings: Kafka) -> None:
    if "compact" in (found["cleanup.policy"] or ""):
        raise TopicError(
            f"topic {name} is compacted: its offsets have holes, and records could be lost unseen; set "
            f"cleanup.policy=delete on it, or kafka.traces_topic to another name"
        )
    limit = int(found["max.message.bytes"] or 0)
    needed = settings.max_message_bytes + HEADROOM_BYTES
    if limit < needed:
        raise TopicError(
            f"topic {name} takes messages of at most {limit} bytes, {needed} are needed: raise max.message.bytes on "
            f"it, or lower kafka.max_message_bytes to {max(limit - HEADROOM_BYTES, 0)}"
        )
