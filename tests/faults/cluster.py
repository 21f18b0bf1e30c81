"""An Apache Kafka cluster whose brokers can be killed and restarted."""

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
    """Brokers that are also controllers. A topic is available while a majority of them runs."""

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
        """Bootstrap addresses for clients."""
        return ",".join(node.bootstrap for node in self.nodes)

    def start(self) -> None:
        """Start the stopped brokers, and block until all answer."""
        for node in self.nodes:
            if not node.process.alive:
                node.prepare()
                node.process.start()
        for node in self.nodes:
            node.process.wait_ready(node.ready, START_S)

    def stop(self) -> None:
        """Stop all brokers. Their data is kept."""
        for node in self.nodes:
            node.stop()

    def kill(self, number: int) -> None:
        """Kill a broker, as at a power loss, except that the kernel completes its writes."""
        process = self.nodes[number].process
        if process.alive and process.pid is not None:
            os.killpg(process.pid, signal.SIGKILL)
        while process.alive:
            time.sleep(0.05)


@contextmanager
def running(folder: Path, nodes: int, free_port: Callable[[], int]) -> Iterator[Cluster]:
    """Run a cluster until the block ends."""
    cluster = Cluster(folder, nodes, free_port)
    try:
        cluster.start()
        yield cluster
    finally:
        # Killed, because the last brokers would wait for the others during a graceful shutdown.
        for number in range(nodes):
            cluster.kill(number)
