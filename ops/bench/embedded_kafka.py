"""An embedded Kafka broker for the time of one benchmark."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ops.local.kafka import Broker
from pipeline import topics
from schemas.settings import Settings


@contextmanager
def running_broker(folder: Path) -> Iterator[Broker]:
    """Run a broker on free ports of loopback, with its data in ``folder``."""
    broker = Broker(folder, free_port(), free_port())
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


def use_broker(settings: Settings, bootstrap_servers: str) -> Settings:
    """Return the settings with that broker, and create the topics on it.

    Raises:
        TopicError: no answer from the broker.
    """
    kafka = settings.kafka.model_copy(update={"bootstrap_servers": bootstrap_servers, "client_options": {}})
    topics.create(kafka)
    return settings.model_copy(update={"kafka": kafka})


def free_port() -> int:
    """Return a port of loopback that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
