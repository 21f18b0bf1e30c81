"""Where partitions begin and end, as far as a client knows."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import watermarks
from pipeline.offsets import Source
from pipeline.watermarks import BrokerAwayError, Watermarks
from schemas.settings import Kafka

NO_OFFSET = -1001
"""What librdkafka says of a partition whose leader died."""


def test_a_partition_without_a_leader_has_no_end_and_another_client_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = iter([NO_OFFSET, 7])

    class Client:
        def __init__(self, *_: Any) -> None:
            self.offset = next(offsets)

        def list_offsets(self, asked: Any, **_: Any) -> Any:
            told: Future[Any] = Future()
            told.set_result(SimpleNamespace(offset=self.offset))
            return dict.fromkeys(asked, told)

        def poll(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(watermarks, "AdminClient", Client)
    asked, source = Watermarks(Kafka()), Source("traces", 0)
    with pytest.raises(BrokerAwayError, match=r"kafka\.bootstrap_servers"):
        asked.bounds([source])
    assert asked.bounds([source]) == {source: (7, 7)}
