"""The Kafka client that brings trace chunks to the broker, and how a chunk looks as a message."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from confluent_kafka import KafkaError, KafkaException, Message
from confluent_kafka import Producer as ConfluentProducer

from schemas.settings import Kafka, SettingsError, Traces
from schemas.telemetry import trace_context
from schemas.telemetry.trace_context import TraceContext
from schemas.trace.record import CONTENT_TYPE, Chunk, fingerprint

NOT_LET_IN = frozenset({KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._SSL})
"""Errors that a wrong ``kafka.client_options`` makes; the client goes on trying."""
Headers = list[tuple[str, str | bytes | None]]


class Producer(Protocol):
    """The part of confluent-kafka's producer that is used here."""

    def produce(
        self,
        topic: str,
        *,
        value: bytes,
        key: bytes,
        headers: Headers,
        on_delivery: Callable[[KafkaError | None, Message], None],
    ) -> None:
        """Queue a message; ``on_delivery`` is called from ``poll`` or ``flush``."""

    def poll(self, timeout: float) -> int:
        """Run the delivery reports that wait."""

    def flush(self, timeout: float) -> int:
        """Wait until nothing is outstanding; returns what still is."""

    def purge(self) -> None:
        """Give up everything outstanding; reports follow."""


def connect(kafka: Kafka, traces: Traces, on_error: Callable[[KafkaError], None]) -> Producer:
    """An idempotent producer that keeps trying for as long as it lives.

    Raises:
        SettingsError: an option in ``kafka.client_options`` that the client does not know.
    """
    ours: dict[str, Any] = {
        "bootstrap.servers": kafka.bootstrap_servers,
        "enable.idempotence": True,
        "acks": "all",
        "message.timeout.ms": 0,
        "message.max.bytes": kafka.max_message_bytes,
        "queue.buffering.max.kbytes": max(1, traces.max_queue_bytes // 1024),
        "linger.ms": 20,
        "compression.type": "none",
        "reconnect.backoff.max.ms": 2000,
        "error_cb": on_error,
        "logger": logging.getLogger("librdkafka"),
    }
    try:
        return ConfluentProducer({**kafka.client_options, **ours})
    except (KafkaException, ValueError) as error:
        raise SettingsError(f"kafka.bootstrap_servers or kafka.client_options: {error}") from error


def headers_of(chunk: Chunk, context: TraceContext) -> Headers:
    """What a consumer sees of a chunk before it decodes it; ``context`` is the span that publishes it."""
    drafted = [r.speculator for r in chunk.verify_steps if r.speculator]
    fields = {
        "content-type": CONTENT_TYPE,
        "schema": fingerprint(),
        "node": chunk.envelope.node,
        "target": chunk.envelope.target,
        "speculator": drafted[-1] if drafted else "",
        "rows": str(len(chunk.verify_steps)),
        trace_context.TRACEPARENT: context.to_traceparent(),
    }
    if chunk.envelope.claim:
        fields["claim-bytes"] = str(chunk.envelope.claim.size)
    return [(name, text.encode()) for name, text in fields.items()]


def message_bytes(value: bytes, key: bytes, headers: Headers) -> int:
    """What a message weighs."""
    return len(value) + len(key) + sum(len(name) + len(text or "") for name, text in headers)
