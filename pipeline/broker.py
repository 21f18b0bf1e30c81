"""Connections to the Kafka broker, for everything but the record stream itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    ListOffsetsResultInfo,
    OffsetSpec,
)

from pipeline.offsets import LogRange, SourcePartition
from schemas.errors import UserError
from schemas.settings import Kafka, SettingsError

TIMEOUT_S = 15.0
WATERMARK_TIMEOUT_S = 10.0
_PROBE_S = 2.0
_PROBE_BYTES = 64 << 10
"""What a probe fetches at once; the broker returns a larger record as a whole."""
_AUTH_ERRORS = frozenset({KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._SSL})


class TopicError(UserError):
    """A topic cannot be reached, created or used. The message names the setting to change."""


class BrokerUnreachableError(RuntimeError):
    """The broker does not answer. The message names the setting with its address."""


class AuthErrorListener:
    """Keeps the last authentication error that a client reports. Pass it as ``error_cb``."""

    def __init__(self) -> None:
        self.last: str | None = None

    def __call__(self, error: KafkaError) -> None:
        """Keep ``error`` if it is an authentication error."""
        if error.code() in _AUTH_ERRORS:
            self.last = error.str()


def client_config(settings: Kafka, **options: Any) -> dict[str, Any]:
    """Return the configuration of a client that writes no log lines of its own."""
    return {
        **settings.client_options,
        "bootstrap.servers": settings.bootstrap_servers,
        "log_level": 0,
        "reconnect.backoff.max.ms": 1000,
        **options,
    }


def connect(settings: Kafka, timeout_s: float = TIMEOUT_S) -> AdminClient:
    """Return an admin client that the broker has answered. Keep it while its calls run.

    Raises:
        TopicError: the broker does not answer, or rejects the credentials.
        SettingsError: ``kafka.client_options`` has an option that the client does not know.
    """
    auth_errors = AuthErrorListener()
    try:
        admin = AdminClient(client_config(settings, error_cb=auth_errors))
    except (KafkaException, ValueError) as error:
        raise SettingsError(f"kafka.bootstrap_servers or kafka.client_options: {error}") from error
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            admin.list_topics(timeout=min(_PROBE_S, timeout_s))
        except KafkaException as error:
            admin.poll(0)
            if auth_errors.last:
                raise TopicError(
                    f"the broker at {settings.bootstrap_servers} rejects this client: {auth_errors.last}; check "
                    f"kafka.client_options"
                ) from error
            if time.monotonic() > deadline:
                raise TopicError(
                    f"no broker answered at {settings.bootstrap_servers} within {timeout_s:g} s "
                    f"({error.args[0].str()}): start one, or set kafka.bootstrap_servers to a running one "
                    f"(kafka.client_options for SASL and TLS)"
                ) from error
        else:
            return admin


class Watermarks:
    """Reads the first and the last offset of partitions from the broker. Blocks while it does. Thread-safe.

    It has a client of its own: while a broker is unreachable, requests of Faust's consumer wait in the same queue as
    its fetches, and would delay them when the broker is back.
    """

    def __init__(self, settings: Kafka) -> None:
        self._settings = settings
        self._auth_errors = AuthErrorListener()
        self._admin = self._connect()

    def read(self, sources: Iterable[SourcePartition]) -> dict[SourcePartition, LogRange]:
        """Return the range of offsets of each partition.

        Raises:
            BrokerUnreachableError: the broker did not return an offset of one of them.
        """
        partitions = {source: TopicPartition(source.topic, source.partition) for source in sources}
        if not partitions:
            return {}
        self._auth_errors.last = None
        admin = self._admin
        starts, stable_ends, ends = (
            admin.list_offsets(
                dict.fromkeys(partitions.values(), spec), isolation_level=isolation, request_timeout=WATERMARK_TIMEOUT_S
            )
            for spec, isolation in (
                (OffsetSpec.earliest(), IsolationLevel.READ_UNCOMMITTED),  # type: ignore[no-untyped-call]
                (OffsetSpec.latest(), IsolationLevel.READ_COMMITTED),  # type: ignore[no-untyped-call]
                (OffsetSpec.latest(), IsolationLevel.READ_UNCOMMITTED),  # type: ignore[no-untyped-call]
            )
        )
        try:
            return {
                source: LogRange(_read_offset(starts[tp]), _read_offset(stable_ends[tp]), _read_offset(ends[tp]))
                for source, tp in partitions.items()
            }
        except KafkaException as error:
            admin.poll(0)
            # A client keeps the leaders that it knew before they were unreachable, and is rejected by them later.
            self._admin = self._connect()
            why = f"{self._auth_errors.last} (kafka.client_options)" if self._auth_errors.last else error.args[0].str()
            raise BrokerUnreachableError(
                f"broker at {self._settings.bootstrap_servers} (kafka.bootstrap_servers): {why}"
            ) from error

    def _connect(self) -> AdminClient:
        return AdminClient(client_config(self._settings, error_cb=self._auth_errors))


class FoundRecord(NamedTuple):
    """The first record from an offset on."""

    offset: int
    """Of the record, or of the log's end."""
    time: float | None
    """Unix time at which the broker received it; None at the log's end."""


class RecordProbe:
    """Reads one record with a consumer of its own, because Faust may skip records. Blocks while it does. Thread-safe.

    It belongs to no group, commits nothing, and receives committed records only.
    """

    def __init__(self, settings: Kafka) -> None:
        self._settings = settings
        self._consumer: Consumer | None = None
        self._lock = threading.Lock()

    def find_record(self, source: SourcePartition, offset: int) -> FoundRecord:
        """Return the first record from ``offset`` on that a consumer receives, or the log's end as the broker says.

        Raises:
            BrokerUnreachableError: the broker did not answer, or its log does not reach to ``offset``.
        """
        with self._lock:
            consumer = self._consumer = self._consumer or self._connect()
            try:
                consumer.assign([TopicPartition(source.topic, source.partition, offset)])
                return _poll_record(consumer)
            except KafkaException as error:
                self._consumer = None
                consumer.close()
                raise BrokerUnreachableError(
                    f"offset {offset} of {source.topic}/{source.partition} on {self._settings.bootstrap_servers} "
                    f"(kafka.bootstrap_servers): {error.args[0].str()}"
                ) from error
            finally:
                with suppress(RuntimeError):  # it is closed
                    consumer.unassign()

    def _connect(self) -> Consumer:
        options = {
            "group.id": "aurora-probe",  # required, and not used
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "auto.offset.reset": "error",
            "fetch.message.max.bytes": _PROBE_BYTES,
            "fetch.wait.max.ms": 100,
            # The client remembers this pause in the next probe.
            "fetch.queue.backoff.ms": 10,
        }
        return Consumer(client_config(self._settings, **options))


def _poll_record(consumer: Consumer) -> FoundRecord:
    deadline = time.monotonic() + WATERMARK_TIMEOUT_S
    while time.monotonic() < deadline:
        message = consumer.poll(0.5)
        if message is None:
            continue
        error, offset = message.error(), message.offset()
        if error is not None and (error.code() != KafkaError._PARTITION_EOF or offset is None):
            raise KafkaException(error)
        if offset is not None:
            return FoundRecord(offset, None if error is not None else message.timestamp()[1] / 1e3)
    raise KafkaException(KafkaError(KafkaError._TIMED_OUT))


def _read_offset(result: Future[ListOffsetsResultInfo]) -> int:
    offset = result.result().offset
    if offset < 0:
        # librdkafka returns it, without an error, for a partition whose leader has died.
        raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE))
    return offset
