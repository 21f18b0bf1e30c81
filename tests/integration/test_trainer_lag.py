"""A lagging trainer is heard by the nodes through a real broker."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from prometheus_client import CollectorRegistry
from serving_node import eventually

from schemas.events import TrainerLag
from schemas.settings import Kafka
from serving.traces.lag_consumer import LagConsumer
from trainer.loop.lag_events import LagEvents
from trainer.loop.metrics import TrainMetrics

LINE = "target.line"
WITHIN_S = 10.0


def create_topic(kafka: Kafka) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    admin.create_topics([NewTopic(kafka.lag_topic, 1, 1)])[kafka.lag_topic].result(10)


@pytest.fixture
def kafka(broker: str) -> Kafka:
    return Kafka(bootstrap_servers=broker, lag_topic=f"lag-{uuid.uuid4().hex}")


@contextmanager
def node_of(kafka: Kafka) -> Iterator[LagConsumer]:
    node = LagConsumer(kafka)
    node.start(LINE)
    yield node
    node.stop()


def trainer_of(kafka: Kafka, line: str = LINE) -> LagEvents:
    return LagEvents(kafka, line, TrainMetrics(CollectorRegistry()).lag_events_dropped)


def ask_until(trainer: LagEvents, node: LagConsumer, share: float) -> None:
    """Send the share again until the node, which reads new events only, has found the topic."""

    def is_heard() -> bool:
        trainer._send_at = 0.0
        trainer.update(4000.0, share)
        return node.share == share

    eventually(is_heard, WITHIN_S)


def test_a_node_follows_the_trainer_down_and_up_again(kafka: Kafka) -> None:
    create_topic(kafka)
    trainer, other = trainer_of(kafka), trainer_of(kafka, "another.line")
    with node_of(kafka) as node:
        ask_until(trainer, node, 0.5)
        unknown = Producer({"bootstrap.servers": kafka.bootstrap_servers})
        unknown.produce(kafka.lag_topic, b"unknown")
        assert unknown.flush(WITHIN_S) == 0
        other.update(9000.0, 0.125)
        other.close()
        trainer.update(5000.0, 0.25)
        eventually(lambda: node.share == 0.25, WITHIN_S)
        trainer.update(0.0, 1.0)
        trainer.close()
        eventually(lambda: node.share == 1.0, WITHIN_S)


def test_a_node_finds_a_topic_that_is_created_later(kafka: Kafka) -> None:
    with node_of(kafka) as node:
        eventually(lambda: node._reader.error is not None, WITHIN_S)
        assert node.share == 1
        create_topic(kafka)
        ask_until(trainer_of(kafka), node, 0.5)


def test_a_new_node_does_not_follow_the_last_event_of_a_dead_trainer(
    kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_topic(kafka)
    dead = trainer_of(kafka)
    dead.update(4000.0, 0.25)
    dead.close()
    heard: list[bytes] = []
    take = LagConsumer.take
    monkeypatch.setattr(LagConsumer, "take", lambda node, value: (heard.append(value), take(node, value)))
    with node_of(kafka) as node:
        ask_until(trainer_of(kafka), node, 0.5)
    assert {TrainerLag.model_validate_json(value).share for value in heard} == {0.5}
