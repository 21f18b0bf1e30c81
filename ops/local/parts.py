"""What the stack on one machine consists of: pure from the settings, up to the addresses of what is embedded."""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from ops.local.kafka import Broker
from ops.local.mlflow_server import RegistryServer
from ops.local.process import Process
from schemas.errors import UserError
from schemas.settings import Kafka, Registry, Settings, to_environ

_LEARNING_NICE = 10
"""Serving never waits for learning: on a full machine the scheduler prefers the node and the stream."""


class PortInUseError(UserError):
    """Something listens where a part would; the message names the setting to change."""


@dataclass(frozen=True)
class Part:
    """One process of the stack, and how to tell that it is ready."""

    name: str
    process: Process
    ready: Callable[[], bool]
    after: tuple[str, ...] = ()
    """Parts that are ready before this one is started."""
    prepare: Callable[[], None] | None = None
    """Runs before every start."""
    ports: Mapping[str, int] = field(default_factory=dict)
    """Ports that it listens on, by the setting that names them."""
    timeout_s: float = 240


@dataclass(frozen=True)
class Plan:
    """The parts in the order of their start, and the settings that all of them get."""

    settings: Settings
    parts: tuple[Part, ...]


def embeds_broker(settings: Settings) -> bool:
    """True when ``kafka.bootstrap_servers`` is left as it is, or names the embedded broker's port."""
    return settings.kafka.bootstrap_servers in (Kafka().bootstrap_servers, f"127.0.0.1:{settings.stack.kafka_port}")


def embeds_registry(settings: Settings) -> bool:
    """True when ``registry.tracking_uri`` is left as it is, or names the embedded server's port."""
    return settings.registry.tracking_uri.rstrip("/") in (
        Registry().tracking_uri,
        f"http://127.0.0.1:{settings.stack.mlflow_port}",
    )


def effective(settings: Settings) -> Settings:
    """The settings with the addresses of what is embedded filled in; a user's own addresses stay."""
    kafka, registry = settings.kafka, settings.registry
    if embeds_broker(settings):
        kafka = kafka.model_copy(update={"bootstrap_servers": f"127.0.0.1:{settings.stack.kafka_port}"})
    if embeds_registry(settings):
        registry = registry.model_copy(update={"tracking_uri": f"http://127.0.0.1:{settings.stack.mlflow_port}"})
    return settings.model_copy(update={"kafka": kafka, "registry": registry})


def log_path(settings: Settings, name: str) -> Path:
    """Where a part's output goes."""
    return Path(settings.stack.data_dir) / "logs" / f"{name}.log"


def plan(settings: Settings) -> Plan:
    """Everything that ``aurora up`` starts.

    Raises:
        JarsError: the embedded broker is wanted and its jars cannot be had.
    """
    settings = effective(settings)
    parts: list[Part] = []
    if embeds_broker(settings):
        parts.append(_broker(settings))
    if embeds_registry(settings):
        parts.append(_registry(settings))
    broker = tuple(part.name for part in parts if part.name == "broker")  # the others wait for the registry themselves
    serve = f"http://{settings.serve.host}:{settings.serve.port}/ready"
    stream = f"http://{settings.stream.host}:{settings.stream.port}/ready"
    parts += [
        _own("stream", settings, {"stream.port": settings.stream.port}, after=broker, probe=stream),
        _own("train", settings, {"train.port": settings.train.port}, after=broker, nice=_LEARNING_NICE),
        _own("promoter", settings, {"promoter.port": settings.promoter.port}, after=broker, nice=_LEARNING_NICE),
        _own("serve", settings, {"serve.port": settings.serve.port}, after=broker, probe=serve),
    ]
    return Plan(settings, tuple(parts))


def check_ports(parts: tuple[Part, ...]) -> None:
    """See that every port is free.

    Raises:
        PortInUseError: one is not.
    """
    for part in parts:
        for setting, port in part.ports.items():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError as error:
                    raise PortInUseError(
                        f"{part.name} needs port {port}, which is in use: set {setting} to a free one, "
                        f"or end the program that listens there"
                    ) from error


def answers(url: str, timeout_s: float = 2) -> bool:
    """True when ``url`` answers 200."""
    with suppress(OSError), urllib.request.urlopen(url, timeout=timeout_s) as answer:  # noqa: S310
        return bool(answer.status == HTTPStatus.OK)
    return False


def _broker(settings: Settings) -> Part:
    stack = settings.stack
    broker = Broker(
        Path(stack.data_dir) / "broker",
        stack.kafka_port,
        stack.kafka_controller_port,
        log_path(settings, "broker").absolute(),
    )
    ports = {"stack.kafka_port": stack.kafka_port, "stack.kafka_controller_port": stack.kafka_controller_port}
    return Part("broker", broker.process, broker.ready, prepare=broker.prepare, ports=ports)


def _registry(settings: Settings) -> Part:
    stack = settings.stack
    server = RegistryServer(
        Path(stack.data_dir) / "registry", stack.mlflow_port, log_path(settings, "registry").absolute()
    )
    return Part("registry", server.process, server.ready, ports={"stack.mlflow_port": stack.mlflow_port})


def _own(
    name: str,
    settings: Settings,
    port: Mapping[str, int],
    *,
    after: tuple[str, ...],
    probe: str | None = None,
    nice: int = 0,
) -> Part:
    """One of our own processes: the ``aurora`` command of that name, with these settings."""
    process = Process(
        name,
        [sys.executable, "-m", "ops.cli.main", name],
        log_path(settings, name).absolute(),
        to_environ(settings),
        nice,
    )
    url = probe or f"http://{getattr(settings, name).host}:{getattr(settings, name).port}/status"
    return Part(name, process, lambda: answers(url), after, ports=port)
