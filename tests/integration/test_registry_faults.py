"""A node keeps serving, catches up, and never returns to an old version while its registry is faulty."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import httpx
import pytest
from api_node import Node, running_node
from echo_engine import EchoEngine
from mlflow.entities.webhook import WebhookEventStr
from pydantic import SecretStr
from registry_proxy import Fault, RegistryProxy
from serving_node import eventually
from tiny_draft import SHAPE

from schemas.events import AUDITED_TAG, Alias, AuditState
from schemas.registry_client import connect, model_name
from schemas.settings import Registry as RegistrySettings
from schemas.settings import Serve, Settings
from schemas.speculator import checkpoint
from schemas.speculator.network import random_draft
from schemas.status import ServeStatus
from serving.versions.cache import MlflowRegistry
from serving.versions.poller import VersionPoller
from trainer.release.registry import SpeculatorRegistry


class Releaser:
    """Registers versions, moves the champion, and records the moves; it bypasses the proxy."""

    def __init__(self, uri: str, folder: Path) -> None:
        self._folder, self._target = folder, uuid.uuid4().hex
        self.line = checkpoint.write_checkpoint(random_draft(SHAPE, 0), folder / "probe", self._target).line
        self._trainer = SpeculatorRegistry(RegistrySettings(tracking_uri=uri))
        self._client = connect(RegistrySettings(tracking_uri=uri))
        self._moves = 0

    def promote(self) -> str:
        """Register a version and make it champion."""
        folder = self._folder / f"after-{self._moves}"
        checkpoint.write_checkpoint(random_draft(SHAPE, self._moves + 1), folder, self._target)
        version = self._trainer.register(self.line, folder, {}, {})
        self.move_champion(version)
        return version

    def move_champion(self, version: str) -> None:
        """Move the alias, then record the move."""
        self._moves += 1
        aliases: dict[Alias, str] = {"champion": version}
        self._trainer.set_alias(self.line, "champion", version)
        audited = AuditState(moves=self._moves, aliases=aliases).model_dump_json()
        self._client.set_registered_model_tag(model_name(self.line), AUDITED_TAG, audited)


class Client:
    """Sends requests to a node without a pause."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.answered, self.failed = 0, list[str]()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._send_requests, daemon=True)
        self._thread.start()

    def wait_for_responses(self) -> None:
        """Wait for responses to new requests."""
        before = self.answered
        eventually(lambda: self.answered >= before + 5 or bool(self.failed))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(30)

    def _send_requests(self) -> None:
        while not self._stopping.wait(0.01):
            answer = self._node.post("/v1/completions", prompt="hello")
            if answer.status_code == 200:
                self.answered += 1
            else:
                self.failed.append(answer.text)


@pytest.fixture
def proxy(registry: str, free_port: Callable[[], int]) -> Iterator[RegistryProxy]:
    proxy = RegistryProxy(free_port(), registry)
    yield proxy
    proxy.close()


def test_a_node_serves_through_registry_faults_and_catches_up(proxy: RegistryProxy, tmp_path: Path) -> None:
    releaser = Releaser(proxy.upstream, tmp_path)
    engine, serve = EchoEngine(), Serve(poll_interval=0.05)
    engine.line = releaser.line
    poller = VersionPoller(
        MlflowRegistry(RegistrySettings(tracking_uri=proxy.uri, timeout=1), releaser.line),
        engine,
        Settings(serve=serve),
    )
    poller.start()
    with running_node(serve, engine, poller) as node, Client(node) as client:

        def status() -> ServeStatus:
            return ServeStatus.model_validate(httpx.get(f"{node.url}/status").json())

        def await_version(version: str) -> None:
            eventually(lambda: status().speculator == version)

        served = [releaser.promote()]
        await_version(served[-1])
        faults: tuple[Fault, ...] = ("unreachable", "slow", "500", "stale")
        for fault in faults:
            proxy.remember()
            with proxy.failing(fault):
                served.append(releaser.promote())
                proxy.await_hits(fault, 2)
                client.wait_for_responses()
                assert status().speculator == served[-2]
            await_version(served[-1])
            assert status().registry_error is None

        proxy.remember()
        releaser.move_champion(served[0])
        await_version(served[0])
        assert status().registry_stale_responses == 0
        with proxy.failing("stale"):
            eventually(lambda: status().registry_stale_responses > 1)
            client.wait_for_responses()
        assert [swap.version for swap in status().swaps] == [*served, served[0]]
        assert (client.failed, status().versions_rejected) == ([], [])
    poller.stop()


def test_a_webhook_of_the_registry_wakes_a_node(registry: str, tmp_path: Path) -> None:
    releaser, secret = Releaser(registry, tmp_path), uuid.uuid4().hex
    engine, serve = EchoEngine(), Serve(poll_interval=3600, webhook_secret=SecretStr(secret))
    engine.line = releaser.line
    poller = VersionPoller(
        MlflowRegistry(RegistrySettings(tracking_uri=registry), releaser.line), engine, Settings(serve=serve)
    )
    client = connect(RegistrySettings(tracking_uri=registry))
    poller.start()
    with running_node(serve, engine, poller) as node:
        events: list[WebhookEventStr] = ["model_version_alias.created", "model_version_alias.deleted"]
        webhook = client.create_webhook(f"node-{releaser.line}", f"{node.url}/webhooks/registry", events, secret=secret)
        time.sleep(1.1)  # MLflow caches its list of webhooks for a second
        version = releaser.promote()
        eventually(lambda: poller.role == "champion")
        assert [swap.version for swap in poller.swaps] == [version]
        client.delete_webhook(webhook.webhook_id)
    poller.stop()
