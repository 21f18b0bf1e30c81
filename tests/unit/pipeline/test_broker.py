"""Tests of the watermarks that a client reads."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import broker
from pipeline.broker import BrokerUnreachableError, Watermarks
from pipeline.offsets import SourcePartition
from schemas.settings import Kafka

NO_OFFSET = -1001
"""Offset that librdkafka returns for a partition whose leader died."""


def test_partition_without_a_leader_is_unreachable_and_the_client_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = iter([NO_OFFSET, 7])

    class Client:
        def __init__(self, *_: Any) -> None:
            self.offset = next(offsets)

        def list_offsets(self, partitions: Any, **_: Any) -> Any:
            result: Future[Any] = Future()
            result.set_result(SimpleNamespace(offset=self.offset))
            return dict.fromkeys(partitions, result)

        def poll(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(broker, "AdminClient", Client)
    watermarks, source = Watermarks(Kafka()), SourcePartition("traces", 0)
    with pytest.raises(BrokerUnreachableError, match=r"kafka\.bootstrap_servers"):
        watermarks.read([source])
    assert watermarks.read([source]) == {source: (7, 7, 7)}
