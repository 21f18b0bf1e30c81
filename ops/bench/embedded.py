"""A broker of the benchmark's own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ops.local.kafka import Broker
from pipeline import topics
from schemas.settings import Settings


@contextmanager
def broker(folder: Path) -> Iterator[Broker]:
    """A running broker on free ports of loopback, with its data in ``folder``."""
    running = Broker(folder, free_port(), free_port())
    running.start()
    try:
        yield running
    finally:
        running.stop()


def pointed_at(settings: Settings, bootstrap: str) -> Settings:
    """The settings with that broker, whose topics exist then.

    Raises:
        TopicError: it does not answer.
    """
    kafka = settings.kafka.model_copy(update={"bootstrap_servers": bootstrap, "client_options": {}})
    topics.create(kafka)
    return settings.model_copy(update={"kafka": kafka})


def free_port() -> int:
    """A port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
