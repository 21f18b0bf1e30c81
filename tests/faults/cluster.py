"""Apache Kafka that dies and comes back: one broker, or three that replicate."""

from __future__ import annotations

import base64
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ops.local.kafka import Broker

START_S = 120


class Cluster:
    """Brokers that are also the controllers of each other; every topic lives as long as most of them do."""

    def __init__(self, folder: Path, nodes: int, free_port: Callable[[], int]) -> None:
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        ports = {node: (free_port(), free_port()) for node in range(1, nodes + 1)}
        replicated = {
            "controller.quorum.voters": ",".join(f"{node}@127.0.0.1:{port}" for node, (_, port) in ports.items()),
            "offsets.topic.replication.factor": nodes,
            "transaction.state.log.replication.factor": nodes,
            "min.insync.replicas": nodes // 2 + 1,
        }
        self.nodes = [
            Broker(folder / f"broker-{node}", *of_node, cluster=cluster, properties={"node.id": node, **replicated})
            for node, of_node in ports.items()
        ]

    @property
    def bootstrap(self) -> str:
        """Addresses for clients."""
        return ",".join(node.bootstrap for node in self.nodes)

    def start(self) -> None:
        """Start those that do not run, and block until all answer."""
        for node in self.nodes:
            if not node.process.alive:
                node.prepare()
                node.process.start()
        for node in self.nodes:
            node.process.wait_ready(node.ready, START_S)

    def stop(self) -> None:
        """End all of them; their data stays."""
        for node in self.nodes:
            node.stop()

    def kill(self, number: int) -> None:
        """End one of them as if its machine lost power, but for the writes that the kernel holds."""
        process = self.nodes[number].process
        if process.alive and process.pid is not None:
            os.killpg(process.pid, signal.SIGKILL)
        while process.alive:
            time.sleep(0.05)


@contextmanager
def running(folder: Path, nodes: int, free_port: Callable[[], int]) -> Iterator[Cluster]:
    """A cluster that runs until the block ends."""
    cluster = Cluster(folder, nodes, free_port)
    try:
        cluster.start()
        yield cluster
    finally:
        # Without a grace: the last ones would wait for the others before they leave.
        for number in range(nodes):
            cluster.kill(number)
