"""Only a recent delivery about this line, signed by the registry, wakes the poller."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import NamedTuple

import httpx
import pytest
from api_node import Node, eventually, running_node
from echo_engine import EchoEngine
from mlflow.webhooks.delivery import _generate_hmac_signature
from pydantic import SecretStr
from version_registry import LINE, FakeRegistry

from schemas.registry_client import model_name
from schemas.settings import Serve, Settings
from schemas.status import ServeStatus
from serving.http.webhook import MAX_AGE_S, PATH, check_delivery, signature
from serving.versions.poller import VersionPoller

SECRET = "geheim-größe"
SERVE = Serve(webhook_secret=SecretStr(SECRET), poll_interval=3600)


class Woken(NamedTuple):
    node: Node
    registry: FakeRegistry

    def deliver(
        self, model: str = model_name(LINE), secret: str = SECRET, age_s: float = 0, altered: bytes = b""
    ) -> httpx.Response:
        body = json.dumps({"entity": "model_version_alias", "data": {"name": model, "alias": "champion"}}).encode()
        sent = str(int(time.time() - age_s))
        headers = {
            "x-mlflow-delivery-id": "d-1",
            "x-mlflow-timestamp": sent,
            "x-mlflow-signature": signature(secret.encode(), "d-1", sent, body),
        }
        return httpx.post(self.node.url + PATH, content=body + altered, headers=headers)

    def version(self) -> str:
        return ServeStatus.model_validate(httpx.get(f"{self.node.url}/status").json()).speculator


@pytest.fixture
def woken() -> Iterator[Woken]:
    """A node whose next poll is an hour away."""
    registry, engine = FakeRegistry(alias="1"), EchoEngine()
    engine.line = LINE
    poller = VersionPoller(registry, engine, Settings(serve=SERVE))
    poller.start()
    with running_node(SERVE, engine, poller) as node:
        eventually(lambda: poller.role == "champion")
        registry.alias = "2"
        yield Woken(node, registry)
    poller.stop()


def test_a_signed_delivery_makes_the_node_poll_at_once(woken: Woken) -> None:
    assert woken.version() == "1"
    assert woken.deliver().status_code == 202
    eventually(lambda: woken.version() == "2")


def test_a_delivery_without_a_valid_signature_is_rejected_and_causes_no_poll(woken: Woken) -> None:
    rejected = [
        woken.deliver(secret="other"),
        woken.deliver(altered=b" "),
        woken.deliver(age_s=MAX_AGE_S + 10),
        woken.deliver(age_s=-MAX_AGE_S - 10),
        httpx.post(woken.node.url + PATH, content=b"{}"),
    ]
    assert [answer.status_code for answer in rejected] == [401] * 5
    assert {answer.json()["error"]["code"] for answer in rejected} == {"invalid_signature"}
    assert SECRET not in "".join(answer.text for answer in rejected)
    assert (woken.version(), woken.registry.downloads) == ("1", ["1"])


def test_a_move_of_another_line_causes_no_poll(woken: Woken) -> None:
    assert woken.deliver(model="aurora.another").status_code == 202
    assert woken.deliver(model=model_name(LINE)).status_code == 202
    eventually(lambda: woken.version() == "2")
    assert woken.registry.polls == 2


def test_without_a_secret_in_the_settings_the_endpoint_is_closed() -> None:
    with running_node() as node:
        sent = str(int(time.time()))
        signed = {"x-mlflow-timestamp": sent, "x-mlflow-signature": signature(b"", "", sent, b"{}")}
        answer = httpx.post(node.url + PATH, content=b"{}", headers=signed)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "webhook_closed")
    assert "serve.webhook_secret" in answer.json()["error"]["message"]


def test_the_signature_is_the_one_that_mlflow_computes() -> None:
    signed = _generate_hmac_signature(SECRET, "delivery", "1800000000", '{"a": 1}')
    assert signature(SECRET.encode(), "delivery", "1800000000", b'{"a": 1}') == signed
    headers = {"x-mlflow-delivery-id": "delivery", "x-mlflow-timestamp": "1800000000", "x-mlflow-signature": signed}
    assert check_delivery(headers, b'{"a": 1}', SECRET.encode(), 1_800_000_100) is None
