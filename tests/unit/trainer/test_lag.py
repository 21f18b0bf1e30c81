"""A trainer that is too far behind skips requests, those without rejected branches first, until it has caught up."""

from __future__ import annotations

import itertools
import random
from datetime import timedelta

import pytest
from data_loader_world import MemoryLog, World, as_json, drain, names, requests
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter

from schemas.events import MIN_SHARE, TrainerLag
from schemas.hash_sampling import is_in_share
from schemas.settings import Kafka
from trainer.data.data_loader import LOSSES
from trainer.data.lag import next_share, select_requests
from trainer.loop.lag_events import INTERVAL_S, VALID_S, LagEvents
from trainer.loop.metrics import TrainMetrics

MAX_LAG = 100.0
shares = st.sampled_from([2.0**-n for n in range(7)])
lags = st.floats(0, 1e7)


@given(shares, lags, lags, lags)
def test_the_share_is_bounded_and_a_higher_lag_never_raises_it(
    share: float, previous: float, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    found = next_share(share, high, previous, MAX_LAG)
    assert MIN_SHARE <= found <= next_share(share, low, previous, MAX_LAG) <= 1
    assert found in (share, min(1.0, share * 2), max(MIN_SHARE, share / 2))


@given(shares, lags)
def test_between_half_of_the_maximum_and_the_maximum_the_share_stays(share: float, previous: float) -> None:
    for lag in (MAX_LAG * 0.51, MAX_LAG):
        assert next_share(share, lag, previous, MAX_LAG) == share


@given(shares, st.floats(MAX_LAG * 1.01, 1e7))
def test_a_falling_lag_does_not_lower_the_share_further(share: float, lag: float) -> None:
    assert next_share(share, lag, lag * 1.1, MAX_LAG) == share


@given(shares, lags, lags)
def test_without_a_maximum_all_requests_are_read(share: float, lag: float, previous: float) -> None:
    assert next_share(share, lag, previous, 0.0) == 1


@given(st.floats(0.2, 50))
def test_the_lag_stays_near_its_maximum_and_the_share_recovers(load: float) -> None:
    """A read has eight seconds of traffic; the trainer takes eight seconds times load and share to train on it."""
    lag, share, previous, seen = 0.0, 1.0, 0.0, []
    for step in itertools.count():
        busy = load if step < 400 else 0.5
        share, previous = next_share(share, lag, previous, MAX_LAG), lag
        lag = max(0.0, lag + 8 * busy * share - 8)
        seen.append(lag)
        if step > 1000:
            break
    assert max(seen) <= MAX_LAG + 2 * 8 * load
    assert (lag, share) == (0, 1)


read_together = st.dictionaries(st.uuids().map(str), st.integers(0, 3), max_size=60)


@given(read_together, shares)
def test_requests_with_rejected_branches_come_first(read: dict[str, int], share: float) -> None:
    kept = select_requests(read, share)
    rejected = {request for request, branches in read.items() if branches}
    assert kept <= read.keys()
    assert kept >= {request for request in rejected if is_in_share(request, share)}, "what nodes keep is not skipped"
    if kept - rejected:
        assert kept >= rejected
    assert kept <= select_requests(read, min(1.0, 2 * share))
    assert kept == select_requests(dict(reversed(read.items())), share)
    assert select_requests(read, 1.0) == read.keys()


@pytest.mark.parametrize("share", [0.5, 0.25, 0.0625])
@pytest.mark.parametrize("with_branches", [0.0, 0.1, 0.5, 1.0])
def test_the_kept_share_is_the_one_asked_for(share: float, with_branches: float) -> None:
    generator = random.Random(0)
    read = {f"request-{i}": int(generator.random() < with_branches) for i in range(8000)}
    assert len(select_requests(read, share)) == pytest.approx(8000 * share, rel=0.1)


def lagging_world(hours: float) -> World:
    log = MemoryLog()
    log.committed_at -= timedelta(hours=hours)
    return World(log)


def test_beyond_the_maximum_lag_requests_are_skipped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    world, ids, kept_out = lagging_world(2), requests(400), requests(20, held_out=True)
    for i in range(20):
        world.commit([*ids[20 * i : 20 * i + 20], kept_out[i]])
    loader = world.data_loader(max_lag=3600, max_epochs=1, replay_batch_size=0)
    assert {kind: loader.counts[kind] for kind in LOSSES} == dict.fromkeys(LOSSES, 0)
    assert set(LOSSES) <= loader.counts.keys(), "they are exported before the first loss"
    trained = [name for step in drain(loader) for name in step]
    assert len(trained) + loader.counts["samples_skipped"] + loader.waiting == len(ids)
    # Two reads of eight commits at shares of a half and a quarter; the last four commits are no lag.
    assert 80 + 60 < len(trained) < 80 + 180
    assert loader.counts["branches_skipped"] == 3 * loader.counts["samples_skipped"] > 0
    assert names(loader.held_out) == kept_out, "versions are compared on all of them"


@pytest.mark.parametrize(("hours", "max_lag"), [(0.9, "1h"), (200, "0s")])
def test_within_the_maximum_lag_nothing_is_skipped(hours: float, max_lag: str) -> None:
    world, ids = lagging_world(hours), requests(40)
    world.commit_as(ids)
    loader = world.data_loader(max_lag=max_lag, max_epochs=1, replay_batch_size=0)
    assert {name for step in drain(loader) for name in step} == set(ids)
    assert (loader.share, loader.counts["samples_skipped"]) == (1, 0)


def test_a_restart_does_not_read_skipped_requests_again() -> None:
    world = lagging_world(2)
    for i in range(20):
        world.commit(requests(400)[20 * i : 20 * i + 20])
    loader = world.data_loader(max_lag=3600, max_epochs=1, replay_batch_size=0)
    loader.poll()
    loader.next_samples()
    restored = world.data_loader(max_lag=3600, max_epochs=1, replay_batch_size=0)
    restored.restore(as_json(loader))
    waiting = loader.waiting
    assert 0 < restored.waiting == waiting < 8 * 20
    assert names(restored.next_samples()) == names(loader.next_samples())


class Broker:
    """Keeps the events that a producer was given."""

    def __init__(self) -> None:
        self.events: list[TrainerLag] = []
        self.connections = 0
        self.is_full = False

    def connect(self, _: Kafka) -> Broker:
        self.connections += 1
        return self

    def produce(self, topic: str, value: bytes, **_: object) -> None:
        assert topic == Kafka().lag_topic
        if self.is_full:
            raise BufferError("queue full")
        self.events.append(TrainerLag.model_validate_json(value))

    def poll(self, _: float) -> int:
        return 0

    def flush(self, _: float) -> int:
        return 0


def dropped() -> Counter:
    return TrainMetrics(CollectorRegistry()).lag_events_dropped


def test_events_repeat_while_the_trainer_is_behind_and_end_with_share_1() -> None:
    broker, now = Broker(), [0.0]
    events = LagEvents(Kafka(), "line", dropped(), broker.connect, lambda: now[0])  # type: ignore[arg-type]
    events.update(0.0, 1.0)
    assert broker.connections == 0, "a trainer that keeps up needs no broker"
    for lag, share in ((4000.0, 0.5), (4000.0, 0.5), (5000.0, 0.25)):
        events.update(lag, share)
    now[0] += INTERVAL_S
    events.update(4500.0, 0.25)
    events.update(0.0, 1.0)
    events.update(0.0, 1.0)
    events.close()
    assert [(event.lag_s, event.share) for event in broker.events] == [
        (4000, 0.5),
        (5000, 0.25),
        (4500, 0.25),
        (0, 1),
    ]
    assert {(event.line, event.valid_s) for event in broker.events} == {("line", VALID_S)}
    assert broker.connections == 1


def test_an_event_that_cannot_be_sent_is_counted_and_stops_nothing() -> None:
    broker, lost = Broker(), dropped()
    events = LagEvents(Kafka(), "line", lost, broker.connect)  # type: ignore[arg-type]
    broker.is_full = True
    events.update(4000.0, 0.5)
    assert lost._value.get() == 1
