"""Real services, one of each per test run, in temporary folders and on free ports."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ops.bench.embedded_kafka import free_port as unused_port
from ops.bench.object_store import ObjectStore
from ops.local.kafka import Broker
from ops.local.mlflow_server import RegistryServer
from schemas.telemetry import logs

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".aurora" / "models" / "smollm2-135m-instruct"

_WEBHOOKS_TO_LOOPBACK = {
    "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http",
    "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    "MLFLOW_WEBHOOK_CACHE_TTL": "1",
}
"""MLflow sends to public addresses only, by TLS, and looks once a minute for webhooks that were made."""


def pytest_configure() -> None:
    """Let Ctrl-C reach the tests of it: what runs in the background ignores it, and so would all that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that runs inside a test must not change how all later tests log."""
    monkeypatch.setattr(logs, "configure", lambda *_: None)


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Gives another free port on loopback at every call."""
    return unused_port


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Bootstrap address of a real Apache Kafka broker. Tests make topics with names of their own."""
    server = Broker(tmp_path_factory.mktemp("broker"), unused_port(), unused_port())
    server.start()
    yield server.bootstrap
    server.stop()


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 server. Tests write below prefixes of their own in its bucket."""
    server = ObjectStore(tmp_path_factory.mktemp("store"), unused_port)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a real MLflow server. Tests register models under lines of their own."""
    server = RegistryServer(tmp_path_factory.mktemp("registry"), unused_port())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _WEBHOOKS_TO_LOOPBACK.items():
            patch.setenv(name, value)
        server.start()
    yield server.uri
    server.stop()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, fetched and converted on first use, then kept in the checkout."""
    from ops.local.demo_model import ensure

    ensure(MODEL)
    return MODEL
