"""The storage of the embedded broker can be formatted with any random cluster id."""

import uuid
from pathlib import Path

import pytest

from ops.local.kafka import Broker


def test_cluster_id_that_begins_with_a_dash_is_not_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(bytes=b"\xfb" * 16))
    broker = Broker(tmp_path / "broker", 1, 2)
    broker.prepare()
    (properties,) = (tmp_path / "broker").rglob("meta.properties")
    assert "cluster.id=-" in properties.read_text()
