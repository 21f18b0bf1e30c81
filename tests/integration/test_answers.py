"""Nodes draft from each other's answers through a real broker, whatever happens to the broker and the topic."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from serving_node import eventually
from tiny_target import VOCABULARY, write_tiny_target

from ops.local.kafka import Broker
from schemas.answers import Answer
from schemas.settings import Kafka, Serve, Settings, load
from schemas.settings.sections import SuffixScope
from serving.answers.answer_consumer import AnswerConsumer
from serving.answers.answer_publisher import AnswerPublisher
from serving.engines.base import Output, Request
from serving.engines.builtin.engine import BuiltinEngine

LINE = "target.line"
WITHIN_S = 5.0


@pytest.fixture
def own_broker(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Broker]:
    """A broker of the test's own, not started yet."""
    server = Broker(tmp_path / "broker", free_port(), free_port())
    yield server
    server.stop()


@pytest.fixture
def kafka(broker: str) -> Kafka:
    settings = kafka_of(broker)
    create_topic(settings)
    return settings


def kafka_of(bootstrap: str) -> Kafka:
    return Kafka(bootstrap_servers=bootstrap, answers_topic=f"answers-{uuid.uuid4().hex}")


def create_topic(kafka: Kafka, partitions: int = 1) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    admin.create_topics([NewTopic(kafka.answers_topic, partitions, 1)])[kafka.answers_topic].result(10)


def delete_topic(kafka: Kafka) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    admin.delete_topics([kafka.answers_topic])[kafka.answers_topic].result(10)


def empty_topic(kafka: Kafka) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    for future in admin.delete_records([TopicPartition(kafka.answers_topic, 0, -1)]).values():
        future.result(10)


@dataclass
class Peer:
    """Publisher and consumer of one node, without an engine."""

    publisher: AnswerPublisher
    consumer: AnswerConsumer
    learned: list[Answer] = field(default_factory=list)

    def say(self, *output: int, label: str | None = None, trace: bool = True) -> None:
        request = Request(f"r-{uuid.uuid4().hex}", (1, 2, 3), 10, label=label, trace=trace)
        self.publisher.publish(request, output)

    def heard(self) -> list[list[int]]:
        return [answer.tokens[answer.prompt_tokens :].tolist() for answer in self.learned]

    def wait_for(self, *output: int) -> None:
        eventually(lambda: list(output) in self.heard(), WITHIN_S)


@contextmanager
def peer(
    kafka: Kafka, node: str, *, line: str = LINE, scope: SuffixScope = "fleet", start_answers: int = 100
) -> Iterator[Peer]:
    serve = Serve(node=node, suffix_scope=scope, suffix_start_answers=start_answers)
    publisher = AnswerPublisher(kafka, scope)
    publisher.start(node, line)
    learned: list[Answer] = []
    consumer = AnswerConsumer(kafka, serve, learned.extend)
    consumer.start(line, VOCABULARY)
    yield Peer(publisher, consumer, learned)
    consumer.stop()
    publisher.close(5)


def test_an_answer_reaches_the_other_node_and_not_the_node_that_gave_it(kafka: Kafka) -> None:
    with peer(kafka, "a") as a, peer(kafka, "b") as b:
        a.say(4, 5, label="math")
        b.wait_for(4, 5)
        (answer,) = b.learned
        assert (answer.node, answer.line, answer.label, answer.tokens.tolist()) == ("a", LINE, "math", [1, 2, 3, 4, 5])
        eventually(lambda: a.consumer.counts().dropped["own"] == 1, WITHIN_S)
        assert a.learned == []
        assert (a.publisher.counts().done, b.consumer.counts().done) == (1, 1)


def test_a_restarted_node_reads_its_own_answers_and_those_of_others(kafka: Kafka) -> None:
    with peer(kafka, "a") as a, peer(kafka, "b") as b:
        a.say(4, 5)
        b.say(6, 7)
        a.wait_for(6, 7)
    with peer(kafka, "a") as again:
        again.wait_for(4, 5)
        again.wait_for(6, 7)


def test_a_node_starts_at_the_newest_answers(kafka: Kafka) -> None:
    with peer(kafka, "a") as a:
        for number in range(20):
            a.say(4, number)
    with peer(kafka, "b", start_answers=5) as b:
        b.wait_for(4, 19)
        assert b.heard() == [[4, number] for number in range(15, 20)]


def test_what_must_not_be_used_is_not_published_or_dropped(kafka: Kafka) -> None:
    with (
        peer(kafka, "a", scope="label") as a,
        peer(kafka, "b", scope="label") as b,
        peer(kafka, "c", line="other") as other,
        peer(kafka, "d", scope="node") as alone,
    ):
        a.say(4, 5, label="math", trace=False)
        a.say(4, 6)
        a.say(4, VOCABULARY, label="math")
        producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
        for broken in (b"", b"\x01\x02", b"{}", bytes(100)):
            producer.produce(kafka.answers_topic, value=broken)
        producer.produce(kafka.answers_topic, value=None, key=b"tombstone")
        producer.flush(10)
        a.say(4, 7, label="math")
        b.wait_for(4, 7)
        assert b.heard() == [[4, 7]]
        assert b.consumer.counts().dropped == {"own": 0, "other_line": 0, "other_scope": 0, "corrupt": 6}
        eventually(lambda: other.consumer.counts().dropped["other_line"] == 2, WITHIN_S)
        eventually(lambda: alone.consumer.counts().dropped["other_scope"] == 2, WITHIN_S)
        assert other.learned == alone.learned == []


def test_an_emptied_topic_and_a_new_one_of_its_name_are_read_on(kafka: Kafka) -> None:
    with peer(kafka, "a") as a, peer(kafka, "b") as b:
        for number in range(10):
            a.say(4, number)
        b.wait_for(4, 9)
        empty_topic(kafka)
        a.say(5, 1)
        b.wait_for(5, 1)
        delete_topic(kafka)
        time.sleep(1)
        create_topic(kafka)
        eventually(lambda: a.say(6, 1) is None and [6, 1] in b.heard(), 60)


def test_a_topic_that_appears_later_is_read(broker: str) -> None:
    kafka = kafka_of(broker)
    with peer(kafka, "a") as a, peer(kafka, "b") as b:
        eventually(lambda: b.consumer.error is not None, 20)
        create_topic(kafka, partitions=3)
        eventually(lambda: a.say(6, 1) is None and [6, 1] in b.heard(), 60)
        assert b.consumer.error is None


def test_an_unreachable_broker_delays_answers_and_nothing_else(own_broker: Broker) -> None:
    kafka = kafka_of(own_broker.bootstrap)
    with peer(kafka, "a") as a, peer(kafka, "b") as b:
        a.say(4, 5)
        eventually(lambda: b.consumer.error is not None, 20)
        own_broker.start()
        create_topic(kafka)
        eventually(lambda: a.say(4, 6) is None and [4, 6] in b.heard(), 60)
        assert own_broker.process.pid
        os.killpg(own_broker.process.pid, signal.SIGKILL)
        started = time.perf_counter()
        for _ in range(2000):
            a.say(*range(2000))
        assert time.perf_counter() - started < 20, "publishing does not block"
        assert a.publisher.counts().dropped["queue_full"] > 0, "the queue is bounded"
        own_broker.start()
        eventually(lambda: a.say(4, 7) is None and [4, 7] in b.heard(), 60)


class Node:
    """An engine with its publisher and its consumer."""

    def __init__(self, settings: Settings) -> None:
        serve = settings.serve
        self.publisher = AnswerPublisher(settings.kafka, serve.suffix_scope)
        self.engine = BuiltinEngine(settings, answers=self.publisher)
        self.publisher.start(serve.node, self.engine.line)
        self.consumer = AnswerConsumer(settings.kafka, serve, self.engine.learn)
        self.engine.start()
        self.consumer.start(self.engine.line, self.engine.vocabulary)

    def answer(self, prompt: Sequence[int]) -> Output:
        outputs: SimpleQueue[Output] = SimpleQueue()
        self.engine.submit(Request(uuid.uuid4().hex, tuple(prompt), 40, ignore_eos=True, label="math"), outputs.put)
        while (output := outputs.get(timeout=60)).finish is None:
            pass
        return output

    def close(self) -> None:
        self.consumer.stop()
        self.engine.stop()
        self.publisher.close(5)


@pytest.fixture
def nodes(tmp_path: Path, kafka: Kafka) -> Iterator[Callable[[str], Node]]:
    """Starts nodes with one target and one topic."""
    target, started = str(write_tiny_target(tmp_path)), []

    def start(name: str) -> Node:
        flags = {
            "target.path": target,
            "speculator.draft_vocab_size": VOCABULARY,
            "kafka.bootstrap_servers": kafka.bootstrap_servers,
            "kafka.answers_topic": kafka.answers_topic,
            "serve.node": name,
            "serve.drafter": "suffix",
            "serve.adaptive_drafting": False,
            "serve.max_model_len": 100,
        }
        started.append(Node(load(environ={}, flags=flags)))
        return started[-1]

    yield start
    for node in started:
        node.close()


def test_a_phrase_answered_by_one_node_is_drafted_by_another_and_after_a_restart(
    nodes: Callable[[str], Node],
) -> None:
    a, b = nodes("a"), nodes("b")
    a.answer((3, 14, 15, 9))
    eventually(lambda: b.engine.corpus.num_tokens > 0, WITHIN_S)
    stats = b.answer((3, 14, 15, 9)).stats
    assert stats is not None
    assert stats.accepted_tokens >= 30, "each draft is accepted completely"
    a.close()
    warm = nodes("a")
    eventually(lambda: warm.engine.corpus.num_tokens > 0, WITHIN_S)
    again = warm.answer((3, 14, 15, 9)).stats
    assert again is not None
    assert again.accepted_tokens >= 30
