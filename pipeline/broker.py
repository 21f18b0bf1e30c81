"""Connections to the Kafka broker, for everything but the record stream itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, NamedTuple

from confluent_kafka import (
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    TopicCollection,
    TopicPartition,
    Uuid,
)
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # re-exported without saying so
    AdminClient,
    ListOffsetsResultInfo,
    OffsetSpec,
    TopicDescription,
)

from pipeline.offsets import LogRange, SourcePartition
from schemas.errors import UserError
from schemas.settings import Kafka, SettingsError

TIMEOUT_S = 15.0
WATERMARK_TIMEOUT_S = 10.0
_PROBE_S = 2.0
_PROBE_BYTES = 64 << 10
"""What a probe fetches at once; the broker returns a larger record as a whole."""
_NO_ID = str(Uuid(0, 0))
"""What a broker without topic ids returns."""
_MISSING = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION})
_AUTH_ERRORS = frozenset({KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._SSL})


class TopicError(UserError):
    """A topic cannot be reached, created or used. The message names the setting to change."""


class BrokerError(RuntimeError):
    """The broker cannot be asked about a topic."""


class BrokerUnreachableError(BrokerError):
    """The broker does not answer. The message names the setting with its address."""


class TopicMissingError(BrokerError):
    """The broker answers, and does not have the topic."""


class TopicState(NamedTuple):
    """A topic as the broker describes it."""

    topic_id: str | None
    """Kafka's id of the topic's log: another one once the topic was deleted and created anew. None without ids."""
    partitions: int


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
    """Reads the ids of topics and the first and last offsets of partitions. Blocks while it does. Thread-safe.

    It has a client of its own: while a broker is unreachable, requests of Faust's consumer wait in the same queue as
    its fetches, and would delay them when the broker is back.
    """

    def __init__(self, settings: Kafka) -> None:
        self._settings = settings
        self._auth_errors = AuthErrorListener()
        self._admin = self._connect()

    def describe(self, topic: str) -> TopicState:
        """Return the id and the number of partitions of a topic.

        Raises:
            TopicMissingError: the broker does not have the topic.
            BrokerUnreachableError: the broker did not answer.
        """
        admin = self._begin()
        try:
            described: TopicDescription = admin.describe_topics(
                TopicCollection([topic]), request_timeout=WATERMARK_TIMEOUT_S
            )[topic].result()
        except KafkaException as error:
            raise self._translate(admin, error, topic) from error
        topic_id = str(described.topic_id)
        return TopicState(None if topic_id == _NO_ID else topic_id, len(described.partitions))

    def read(self, sources: Iterable[SourcePartition]) -> dict[SourcePartition, LogRange]:
        """Return the range of offsets of each partition.

        Raises:
            TopicMissingError: the broker does not have one of them.
            BrokerUnreachableError: the broker did not return an offset of one of them.
        """
        partitions = {source: TopicPartition(source.broker_topic, source.partition) for source in sources}
        if not partitions:
            return {}
        admin = self._begin()
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
            raise self._translate(admin, error, next(iter(partitions)).broker_topic) from error

    def _begin(self) -> AdminClient:
        self._auth_errors.last = None
        return self._admin

    def _translate(self, admin: AdminClient, error: KafkaException, topic: str) -> BrokerError:
        address = f"{self._settings.bootstrap_servers} (kafka.bootstrap_servers)"
        if error.args[0].code() in _MISSING:
            return TopicMissingError(
                f"topic {topic} does not exist on the broker at {address}: it was deleted, or another broker is meant. "
                f"`aurora topics apply` and a starting stream worker create it, empty"
            )
        admin.poll(0)
        # A client keeps the leaders that it knew before they were unreachable, and is rejected by them later.
        self._admin = self._connect()
        why = f"{self._auth_errors.last} (kafka.client_options)" if self._auth_errors.last else error.args[0].str()
        return BrokerUnreachableError(f"broker at {address}: {why}")

    def _connect(self) -> AdminClient:
        return AdminClient(client_config(self._settings, error_cb=self._auth_errors))


class FoundRecord(NamedTuple):
    """The first record from an offset on."""

    offset: int
    """Of the record, or of the log's end."""
    message: Message | None
    """None at the log's end."""

    @property
    def time(self) -> float | None:
        """Unix time at which the broker received the record; None at the log's end."""
        return None if self.message is None else self.message.timestamp()[1] / 1e3


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
                consumer.assign([TopicPartition(source.broker_topic, source.partition, offset)])
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
            return FoundRecord(offset, message if error is None else None)
    raise KafkaException(KafkaError(KafkaError._TIMED_OUT))


def _read_offset(result: Future[ListOffsetsResultInfo]) -> int:
    offset = result.result().offset
    if offset < 0:
        # librdkafka returns it, without an error, for a partition whose leader has died.
        raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE))
    return offset
