"""The Kafka consumer of the stream worker: the Faust app, its credentials, and the buffer between it and the tables."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import faust
import structlog
from aiokafka.conn import create_conn
from aiokafka.errors import KafkaError
from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth
from faust.types.auth import CredentialsT

from pipeline.broker import TopicError
from pipeline.transport import CommittedApp
from schemas.settings import Kafka, Settings, SettingsError, Stream

log = structlog.get_logger()
T = TypeVar("T")

REBALANCE_TIMEOUT_S = 60.0
"""Time that the group waits in a rebalance for workers that do not come back."""
REQUEST_TIMEOUT_S = 30.0
"""Timeout of a request to the broker, unless the session timeout is longer."""
BUFFERED_COMMITS = 4
"""Commits whose records are read ahead while one runs. With half of it a worker reads too little meanwhile, and writes
large messages to the tables a third more slowly."""
FLUSH_INTERVALS_S = (1.0, 10.0)
"""Defaults of ``stream.flush_interval`` for tables in a folder and in an object store."""
FETCH_MESSAGES = 8
"""Messages of the largest size that one fetch may return for a partition. The next fetch is sent when they are used."""
_FOREVER_S = 365 * 86400.0
_CONNECT_TIMEOUT_S = 15.0
_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
SUPPORTED_OPTIONS = frozenset(
    {
        "security.protocol",
        "sasl.mechanism",
        "sasl.mechanisms",
        "sasl.username",
        "sasl.password",
        "ssl.ca.location",
        "ssl.ca.pem",
        "ssl.certificate.location",
        "ssl.key.location",
        "ssl.key.password",
        "ssl.endpoint.identification.algorithm",
        "enable.ssl.certificate.verification",
    }
)
"""Options of ``kafka.client_options``, in librdkafka's names, that the Faust consumer supports."""


def buffer_bytes(stream: Stream) -> int:
    """Return how many bytes of records a worker holds."""
    return BUFFERED_COMMITS * stream.flush_bytes


def flush_interval_s(settings: Settings) -> float:
    """Return the age of the oldest buffered record that triggers a commit."""
    return settings.stream.flush_interval or FLUSH_INTERVALS_S["://" in settings.tables.uri]


def create_app(settings: Settings) -> CommittedApp:
    """Create the Faust app. It reads committed records and commits offsets; it has no tables and declares no topics."""
    kafka, stream = settings.kafka, settings.stream
    if ignored := find_ignored_options(kafka.client_options):
        log.warning("kafka_client_options_ignored", options=ignored, by="the stream's consumer")
    # Faust limits what it holds by a number of records: allow no more of the largest ones than the buffer holds.
    records = max(1, min(stream.flush_records, buffer_bytes(stream) // kafka.max_message_bytes))
    return CommittedApp(
        stream.group_id,
        broker=[f"kafka://{address.strip()}" for address in kafka.bootstrap_servers.split(",")],
        broker_credentials=build_credentials(kafka.client_options),
        broker_session_timeout=stream.session_timeout,
        broker_heartbeat_interval=stream.session_timeout / 4,
        broker_rebalance_timeout=REBALANCE_TIMEOUT_S,
        # Faust refuses a shorter one than the session timeout.
        broker_request_timeout=max(REQUEST_TIMEOUT_S, stream.session_timeout),
        # A worker without partitions, or with unreachable tables, reads nothing and is healthy. If it left the group
        # for that, it would not join again.
        broker_max_poll_interval=_FOREVER_S,
        broker_max_poll_records=records,
        consumer_max_fetch_size=max(1 << 20, FETCH_MESSAGES * kafka.max_message_bytes),
        consumer_auto_offset_reset="earliest",
        consumer_group_instance_id=stream.static_member or None,
        stream_buffer_maxsize=records,
        datadir=_create_data_dir(stream.data_dir),
        store="memory://",
        topic_allow_declare=False,
        topic_disable_leader=True,
        web_host=stream.host,
        web_bind=stream.host,
        web_port=stream.port,
        autodiscover=False,
    )


def _create_data_dir(data_dir: str) -> Path:
    """Create Faust's folder. Without its parent folder Faust exits and logs nothing."""
    folder = Path(data_dir).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"stream.data_dir {folder}: {error.strerror}; set another folder") from error
    return folder


def find_ignored_options(options: Mapping[str, str]) -> list[str]:
    """Return the options that other Kafka clients support and this consumer ignores.

    Raises:
        SettingsError: an unsupported option is about security: the consumer could not connect without it.
    """
    unsupported = sorted(set(options) - SUPPORTED_OPTIONS)
    if security := [name for name in unsupported if name.startswith(("ssl.", "sasl."))]:
        raise SettingsError(
            f"kafka.client_options: {', '.join(security)}: the stream's consumer does not support this; it supports "
            f"{', '.join(sorted(SUPPORTED_OPTIONS))}"
        )
    return unsupported


def build_credentials(options: Mapping[str, str]) -> CredentialsT | None:
    """Return the consumer's credentials; None for a plaintext connection.

    Raises:
        SettingsError: a protocol, a mechanism or a certificate is unusable.
    """
    protocol = options.get("security.protocol", "PLAINTEXT").upper()
    if protocol not in _PROTOCOLS:
        raise SettingsError(f"kafka.client_options: security.protocol {protocol!r} is none of {', '.join(_PROTOCOLS)}")
    if protocol == "PLAINTEXT":
        return None
    context = _build_ssl_context(options) if protocol.endswith("SSL") else None
    if not protocol.startswith("SASL"):
        return faust.SSLCredentials(context)
    mechanism = options.get("sasl.mechanism") or options.get("sasl.mechanisms") or "PLAIN"
    if mechanism not in _MECHANISMS:
        raise SettingsError(
            f"kafka.client_options: sasl.mechanism {mechanism!r}: the stream's consumer supports "
            f"{', '.join(_MECHANISMS)}"
        )
    return faust.SASLCredentials(
        username=options.get("sasl.username"),
        password=options.get("sasl.password"),
        mechanism=mechanism,
        ssl_context=context,
    )


def check_connection(kafka: Kafka) -> None:
    """Connect once with the consumer's credentials, because Faust does not log why a connection fails.

    Raises:
        TopicError: no broker of ``kafka.bootstrap_servers`` accepts the connection.
        SettingsError: as for ``build_credentials``.
    """
    auth = credentials_to_aiokafka_auth(build_credentials(kafka.client_options), None)
    asyncio.run(_connect_any(kafka.bootstrap_servers, auth))


async def _connect_any(bootstrap_servers: str, auth: Mapping[str, Any]) -> None:
    reasons = []
    for address in bootstrap_servers.split(","):
        host, _, port = address.strip().rpartition(":")
        try:
            connection = await asyncio.wait_for(create_conn(host.strip("[]"), int(port), **auth), _CONNECT_TIMEOUT_S)
        except (KafkaError, OSError, ValueError) as error:
            reasons.append(f"{address.strip()}: {str(error) or type(error).__name__}")
        else:
            connection.close()
            return
    raise TopicError(
        f"no broker accepts the stream's consumer ({'; '.join(reasons)}): check kafka.client_options and "
        f"kafka.bootstrap_servers"
    )


def _build_ssl_context(options: Mapping[str, str]) -> ssl.SSLContext:
    certificate = options.get("ssl.certificate.location")
    try:
        context = ssl.create_default_context(cafile=options.get("ssl.ca.location"), cadata=options.get("ssl.ca.pem"))
        if certificate is not None:
            context.load_cert_chain(certificate, options.get("ssl.key.location"), options.get("ssl.key.password"))
    except (OSError, ValueError) as error:
        files = ", ".join(f"{name} {options[name]}" for name in sorted(options) if name.endswith(".location"))
        raise SettingsError(f"kafka.client_options: {error} ({files})") from error
    if options.get("ssl.endpoint.identification.algorithm") == "none":
        context.check_hostname = False
    if options.get("enable.ssl.certificate.verification") == "false":
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class RecordBuffer(Generic[T]):
    """A queue between the task that reads records and the task that writes them, bounded in bytes.

    While the tables are slow, reading waits and memory use stays constant. Use it on one event loop.

    Args:
        batch_records: Maximum number of items of a batch.
        batch_bytes: Size at which a batch is full.
        linger_s: A batch that is not full is returned when its first item is this old.
        max_bytes: Bytes that the buffer may hold. A single item may be larger.
    """

    def __init__(self, batch_records: int, batch_bytes: int, linger_s: float, max_bytes: int) -> None:
        self._batch_records = batch_records
        self._batch_bytes = batch_bytes
        self._linger_s = linger_s
        self._max_bytes = max_bytes
        self._items: deque[tuple[T, int, float]] = deque()
        self._bytes = 0
        self._not_empty = asyncio.Event()
        self._batch_ready = asyncio.Event()
        self._has_room = asyncio.Event()

    @property
    def bytes(self) -> int:
        """Bytes in the buffer."""
        return self._bytes

    @property
    def full(self) -> bool:
        """True if the next item may have to wait: reading is blocked by writing."""
        return self._bytes >= self._max_bytes

    async def put(self, item: T, size: int) -> None:
        """Add an item of ``size`` bytes as soon as there is room for it."""
        while self._items and self._bytes + size > self._max_bytes:
            self._batch_ready.set()
            self._has_room.clear()
            await self._has_room.wait()
        self._items.append((item, size, time.monotonic()))
        self._bytes += size
        self._not_empty.set()
        if len(self._items) >= self._batch_records or self._bytes >= self._batch_bytes:
            self._batch_ready.set()

    async def take_batch(self) -> list[T]:
        """Remove and return the oldest items: a full batch, or every item once the first one is ``linger_s`` old."""
        await self._not_empty.wait()
        _, _, added_at = self._items[0]
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, added_at + self._linger_s - time.monotonic())):
                await self._batch_ready.wait()
        batch: list[T] = []
        batch_bytes = 0
        while self._items and len(batch) < self._batch_records and batch_bytes < self._batch_bytes:
            item, size, _ = self._items.popleft()
            batch.append(item)
            batch_bytes += size
        self._bytes -= batch_bytes
        if not self._items:
            self._not_empty.clear()
        if len(self._items) < self._batch_records and self._bytes < self._batch_bytes:
            self._batch_ready.clear()
        self._has_room.set()
        return batch
