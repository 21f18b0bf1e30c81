"""Parts of the stack on one machine, derived from the settings."""

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

_TRAINING_NICE = 10
"""Serving never waits for training: on a busy machine the scheduler prefers node and stream."""


class PortInUseError(UserError):
    """The port of a part is in use; the message names the setting to change."""


@dataclass(frozen=True)
class Part:
    """One process of the stack and its readiness probe."""

    name: str
    process: Process
    ready: Callable[[], bool]
    after: tuple[str, ...] = ()
    """Parts that must be ready before this one starts."""
    prepare: Callable[[], None] | None = None
    """Called before every start."""
    ports: Mapping[str, int] = field(default_factory=dict)
    """Ports that it listens on, by setting."""
    timeout_s: float = 240


@dataclass(frozen=True)
class StackPlan:
    """Parts in start order, and the settings that they share."""

    settings: Settings
    parts: tuple[Part, ...]


def embeds_broker(settings: Settings) -> bool:
    """Return whether ``kafka.bootstrap_servers`` has its default or names the port of the embedded broker."""
    return settings.kafka.bootstrap_servers in (Kafka().bootstrap_servers, f"127.0.0.1:{settings.stack.kafka_port}")


def embeds_registry(settings: Settings) -> bool:
    """Return whether ``registry.tracking_uri`` has its default or names the port of the embedded server."""
    return settings.registry.tracking_uri.rstrip("/") in (
        Registry().tracking_uri,
        f"http://127.0.0.1:{settings.stack.mlflow_port}",
    )


def resolve_addresses(settings: Settings) -> Settings:
    """Return the settings with the addresses of embedded services; keep the user's own addresses."""
    kafka, registry = settings.kafka, settings.registry
    if embeds_broker(settings):
        kafka = kafka.model_copy(update={"bootstrap_servers": f"127.0.0.1:{settings.stack.kafka_port}"})
    if embeds_registry(settings):
        registry = registry.model_copy(update={"tracking_uri": f"http://127.0.0.1:{settings.stack.mlflow_port}"})
    return settings.model_copy(update={"kafka": kafka, "registry": registry})


def log_path(settings: Settings, name: str) -> Path:
    """Return the log file of a part."""
    return Path(settings.stack.data_dir) / "logs" / f"{name}.log"


def plan_stack(settings: Settings) -> StackPlan:
    """Return all parts that ``aurora up`` starts.

    Raises:
        JarsError: the jars of the embedded broker cannot be fetched.
    """
    settings = resolve_addresses(settings)
    parts: list[Part] = []
    if embeds_broker(settings):
        parts.append(_broker_part(settings))
    if embeds_registry(settings):
        parts.append(_registry_part(settings))
    # The other parts wait for the broker; they retry the registry themselves.
    broker = tuple(part.name for part in parts if part.name == "broker")
    parts += [
        _aurora_part("stream", settings, broker, probe="/ready"),
        _aurora_part("train", settings, broker, nice=_TRAINING_NICE),
        _aurora_part("promoter", settings, broker, nice=_TRAINING_NICE),
        _aurora_part("serve", settings, broker, probe="/ready"),
    ]
    return StackPlan(settings, tuple(parts))


def check_ports(parts: tuple[Part, ...]) -> None:
    """Check that every port is free.

    Raises:
        PortInUseError: a port is in use.
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
                        f"or stop the program that listens there"
                    ) from error


def is_answering(url: str, timeout_s: float = 2) -> bool:
    """Return whether a GET of ``url`` answers 200."""
    with suppress(OSError), urllib.request.urlopen(url, timeout=timeout_s) as answer:  # noqa: S310
        return bool(answer.status == HTTPStatus.OK)
    return False


def _broker_part(settings: Settings) -> Part:
    stack = settings.stack
    broker = Broker(
        Path(stack.data_dir) / "broker",
        stack.kafka_port,
        stack.kafka_controller_port,
        log_path(settings, "broker").absolute(),
    )
    ports = {"stack.kafka_port": stack.kafka_port, "stack.kafka_controller_port": stack.kafka_controller_port}
    return Part("broker", broker.process, broker.ready, prepare=broker.prepare, ports=ports)


def _registry_part(settings: Settings) -> Part:
    stack = settings.stack
    server = RegistryServer(
        Path(stack.data_dir) / "registry", stack.mlflow_port, log_path(settings, "registry").absolute()
    )
    return Part("registry", server.process, server.ready, ports={"stack.mlflow_port": stack.mlflow_port})


def _aurora_part(
    name: str, settings: Settings, after: tuple[str, ...], *, probe: str = "/status", nice: int = 0
) -> Part:
    """Return the part that runs the ``aurora`` command of that name."""
    address = getattr(settings, name)
    url = f"http://{address.host}:{address.port}{probe}"
    command = [sys.executable, "-m", "ops.cli.main", name]
    process = Process(name, command, log_path(settings, name).absolute(), to_environ(settings), nice)
    return Part(name, process, lambda: is_answering(url), after, ports={f"{name}.port": address.port})
