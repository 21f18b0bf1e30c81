"""An embedded Kafka broker for the time of one benchmark, and consumers that read a topic once."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from confluent_kafka import Consumer, Message, TopicPartition

from ops.local.kafka import Broker
from pipeline import topics
from pipeline.broker import client_config
from schemas.errors import UserError
from schemas.settings import Kafka, Settings

_CONSUMED_AT_ONCE = 256
_MAX_EMPTY_POLLS = 30


@contextmanager
def running_broker(folder: Path) -> Iterator[Broker]:
    """Run a broker on free ports of loopback, with its data in ``folder``."""
    broker = Broker(folder, free_port(), free_port())
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


def use_broker(settings: Settings, bootstrap_servers: str) -> Settings:
    """Return the settings with that broker, and create the topics on it.

    Raises:
        TopicError: no answer from the broker.
    """
    kafka = settings.kafka.model_copy(update={"bootstrap_servers": bootstrap_servers, "client_options": {}})
    topics.create(kafka)
    return settings.model_copy(update={"kafka": kafka})


def free_port() -> int:
    """Return a port of loopback that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def open_consumer(kafka: Kafka) -> Iterator[Consumer]:
    """Yield a consumer at the start of every partition of the traces topic."""
    options = {"group.id": "bench", "enable.auto.commit": False, "auto.offset.reset": "earliest"}
    consumer = Consumer(client_config(kafka, **options))
    try:
        consumer.assign([TopicPartition(kafka.traces_topic, number, 0) for number in range(kafka.partitions)])
        yield consumer
    finally:
        consumer.close()


def consume_all(consumer: Consumer) -> Iterator[Message]:
    """Yield the messages up to the present end of all assigned partitions."""
    left = sum(consumer.get_watermark_offsets(partition)[1] for partition in consumer.assignment())
    empty_polls = 0
    while left > 0:
        messages = consumer.consume(_CONSUMED_AT_ONCE, timeout=1.0)
        empty_polls = 0 if messages else empty_polls + 1
        if empty_polls > _MAX_EMPTY_POLLS:
            raise UserError(f"the topic could not be read: {left} messages are missing")
        for message in messages:
            if message.error():
                raise UserError(f"the topic could not be read: {message.error()}")
            left -= 1
            yield message
