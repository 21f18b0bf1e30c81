"""A node publishes the share of the requests that the trainer asks for, and all when nobody asks any more."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from trace_bench import Bench, a_verify_step

from schemas.events import TrainerLag
from schemas.hash_sampling import is_in_share
from schemas.settings import Kafka
from serving.engines.base import Request
from serving.traces.lag_consumer import MAX_VALID_S, LagConsumer

NOW = 1_800_000_000.0


class Node:
    """A lag consumer of the line ``line`` with manual clocks and without a broker."""

    def __init__(self) -> None:
        self.elapsed = 50.0
        self.consumer = LagConsumer(Kafka(), lambda: NOW, lambda: self.elapsed)
        self.consumer._line = "line"

    def hear(self, share: float, *, line: str = "line", age: float = 0.0, valid_s: float = 120.0) -> None:
        time = datetime.fromtimestamp(NOW - age, UTC)
        event = TrainerLag(time=time, line=line, lag_s=4000, share=share, valid_s=valid_s)
        self.consumer.take(event.model_dump_json().encode())


@pytest.fixture
def node() -> Node:
    return Node()


def test_without_an_event_all_requests_are_published(node: Node) -> None:
    assert node.consumer.share == 1


def test_the_newest_event_holds_until_it_expires(node: Node) -> None:
    node.hear(0.5)
    node.hear(0.25)
    node.elapsed += 119
    assert node.consumer.share == 0.25
    node.elapsed += 1
    assert node.consumer.share == 1, "a dead trainer is forgotten"
    node.hear(0.25)
    node.hear(1.0)
    assert node.consumer.share == 1, "a trainer that has caught up says so"


def test_no_event_holds_longer_than_the_limit(node: Node) -> None:
    node.hear(0.25, valid_s=1e9)
    node.elapsed += MAX_VALID_S
    assert node.consumer.share == 1


def test_old_and_foreign_events_are_ignored(node: Node) -> None:
    node.hear(0.5)
    node.hear(0.25, age=121)
    node.hear(0.25, line="other")
    assert node.consumer.share == 0.5
    node.hear(0.25, age=-3600)
    assert node.consumer.share == 0.25, "a trainer's clock may be ahead"


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"not json",
        b'{"time": "2027-01-15T08:00:00Z", "line": "line", "share": 0.25}',
        b'{"time": "2027-01-15T08:00:00Z", "line": "line", "lag_s": 9, "share": 0.001, "valid_s": 120}',
    ],
)
def test_unknown_events_are_ignored(node: Node, value: bytes) -> None:
    node.consumer.take(value)
    assert node.consumer.share == 1


class Lag(LagConsumer):
    """A consumer without a thread."""

    asked = 1.0

    def __init__(self) -> None:
        pass

    @property
    def share(self) -> float:
        return self.asked

    def start(self, line: str) -> None:
        pass

    def stop(self) -> None:
        pass


def test_requests_outside_the_share_are_dropped_whole_and_counted() -> None:
    lag = Lag()
    bench = Bench(lag=lag)
    lag.asked = 0.25
    for _ in range(60):
        bench.send(verify_steps=3)
    counts = bench.publisher.close(5)
    kept = {f"chatcmpl-{i}" for i in range(1, 61) if is_in_share(f"chatcmpl-{i}", 0.25)}
    assert {chunk.envelope.request for chunk in bench.producer.delivered} == kept
    assert 0 < len(kept) < 60
    assert (counts.captured, counts.published) == (180, 3 * len(kept))
    assert counts.dropped == {"trainer_lag": 180 - 3 * len(kept)}


def test_a_running_request_is_published_as_it_began() -> None:
    lag = Lag()
    bench = Bench(lag=lag)
    outside = next(f"r{i}" for i in range(99) if not is_in_share(f"r{i}", 0.25))
    request = Request(outside, (1,), 5)
    bench.publisher.record(request, (a_verify_step(0),), None)
    lag.asked = 0.25
    bench.publisher.record(request, (a_verify_step(1),), "stop")
    bench.publisher.record(request, (a_verify_step(0),), None)
    lag.asked = 1.0
    bench.publisher.record(request, (a_verify_step(1),), "stop")
    counts = bench.publisher.close(5)
    assert (counts.published, counts.dropped) == (2, {"trainer_lag": 2}), "the same id again is another request"
    assert bench.publisher._wanted == {}


def test_an_event_with_a_field_of_a_later_release_counts(node: Node) -> None:
    node.consumer.take(
        b'{"time": "2027-01-15T08:00:00Z", "line": "line", "lag_s": 9, "share": 0.25, "valid_s": 120, "kind": "new"}'
    )
    assert node.consumer.share == 0.25
