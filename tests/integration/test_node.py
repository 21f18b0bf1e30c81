"""A whole node in its own process with the real model: serving, traces, swaps under load, and shutdown."""

from __future__ import annotations

import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from serving_node import MODEL, Node, eventually

from schemas.settings import SettingsError, load
from schemas.speculator import checkpoint
from schemas.speculator.day_0_draft import create_day_0_draft
from schemas.trace.decoder import decode
from schemas.trace.record import Chunk
from serving.http.server import bind
from trainer.release.registry import SpeculatorRegistry

_LONG = "Write a long story about a dragon and a lighthouse."


@pytest.fixture
def start(smollm2: Path, tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Callable[..., Node]]:
    """Starts a node with the given flags; ends it when the test does."""
    nodes: list[Node] = []

    def make(**flags: Any) -> Node:
        nowhere = {
            "kafka.bootstrap_servers": f"127.0.0.1:{free_port()}",
            "registry.tracking_uri": f"http://127.0.0.1:{free_port()}",
        }
        ours = {
            "target.path": str(smollm2),
            "serve.port": free_port(),
            "serve.max_model_len": 256,
            "serve.poll_interval": 0.2,
        }
        # Every verify step drafts, whatever a random draft is worth.
        ours |= {"serve.adaptive_drafting": False, "serve.num_speculative_tokens": 3}
        named = {name.replace("__", "."): value for name, value in flags.items()}
        nodes.append(Node(load(environ={}, flags=nowhere | ours | named), tmp_path))
        nodes[-1].wait_ready()
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


def chunks_in(bootstrap: str, topic: str) -> list[Chunk]:
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "test", "enable.auto.commit": False})
    chunks: list[Chunk] = []
    for number in range(2):
        partition = TopicPartition(topic, number, 0)
        _, end = consumer.get_watermark_offsets(partition, timeout=10)
        consumer.assign([partition])
        for _ in range(end):
            record = consumer.poll(10)
            assert record is not None
            assert record.error() is None
            chunks.append(decode(record.value()))
    consumer.close()
    return chunks


def make_topic(bootstrap: str) -> str:
    name = f"traces-{uuid.uuid4().hex}"
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for future in admin.create_topics([NewTopic(name, 2, 1)]).values():
        future.result(10)
    return name


def test_a_node_without_broker_and_registry_serves_and_ends_cleanly(start: Callable[..., Node]) -> None:
    node = start()
    answer = node.ask("What is the capital of France?")
    assert "Paris" in answer.choices[0].message.content
    assert answer.aurora["speculators"] == ["day-0-head-0"]
    eventually(lambda: node.status().registry_error is not None)
    status = node.status()
    assert (status.requests_finished, status.requests_failed, status.speculator) == (1, 0, "day-0-head-0")
    assert status.rows_captured == status.rows_pending == answer.aurora["verify_steps"] + 1
    closed = node.end()
    assert (closed["captured"], closed["published"]) == (status.rows_captured, 0)
    assert sum(closed["dropped"].values()) == status.rows_captured


def test_every_verify_step_is_traced_and_a_swap_under_load_changes_no_answer(
    start: Callable[..., Node], broker: str, registry: str, smollm2: Path, tmp_path: Path
) -> None:
    topic = make_topic(broker)
    # A draft of another shape is a line of its own: what other tests promote is not followed here.
    shape = {"speculator__intermediate_size": 1280}
    node = start(kafka__bootstrap_servers=broker, kafka__traces_topic=topic, registry__tracking_uri=registry, **shape)
    before = node.ask(_LONG, max_tokens=16)

    draft = create_day_0_draft(smollm2, node.settings.speculator.model_copy(update={"seed": 9}))
    status = node.status()
    checkpoint.write_checkpoint(draft, tmp_path / "version", status.target)
    trainer = SpeculatorRegistry(node.settings.registry)
    version = trainer.register(status.line, tmp_path / "version", {}, {})

    answers: list[Any] = []
    streams = [threading.Thread(target=lambda: answers.append(node.ask(_LONG, max_tokens=120))) for _ in range(2)]
    for stream in streams:
        stream.start()
    eventually(lambda: node.status().requests_running == 2)
    trainer.set_alias(status.line, "champion", version)
    for stream in streams:
        stream.join()

    (swap,) = node.status().swaps
    assert (swap.version, swap.in_flight) == (version, 2)
    assert [a.aurora["speculators"] for a in answers] == [["day-0-head-0", version]] * 2
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].choices[0].message.content.startswith(before.choices[0].message.content)
    raw = node.client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], max_tokens=4, extra_headers={"x-aurora-trace": "off"}
    )
    assert raw.headers["x-aurora-speculator"] == version

    eventually(lambda: node.status().rows_pending == 0)
    closed = node.end()
    chunks = chunks_in(broker, topic)
    traced = {a.id: a for a in [before, *answers]}
    assert {c.envelope.request for c in chunks} == set(traced)
    assert sum(len(c.verify_steps) for c in chunks) == closed["published"] == closed["captured"]
    for name, answer in traced.items():
        verify_steps = [r for c in chunks if c.envelope.request == name for r in c.verify_steps]
        verified = [r for r in verify_steps if r.verify_step > 0]
        assert len(verified) == answer.aurora["verify_steps"]
        assert sum(len(r.draft_tokens) for r in verified) == answer.aurora["draft_tokens"]
        assert list(dict.fromkeys(r.speculator for r in verified if r.draft_tokens)) == answer.aurora["speculators"]


def test_a_draining_node_finishes_its_answer_and_rejects_new_requests(start: Callable[..., Node]) -> None:
    node = start(serve__drain_timeout=60)
    stream = iter(node.ask(_LONG, max_tokens=48, stream=True))
    next(stream)
    node.process.send_signal(signal.SIGTERM)
    eventually(lambda: httpx.get(f"{node.url}/ready").status_code == 503)
    assert httpx.get(f"{node.url}/health").status_code == 200
    with pytest.raises(openai.InternalServerError) as refused:
        node.ask("Hi")
    assert (refused.value.status_code, refused.value.code) == (503, "node_draining")
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")
    assert node.process.wait(30) == 0
    assert "traces_closed" in node.log.read_text()


def test_an_idle_node_accepts_requests_with_a_key_until_its_delay_is_over(
    start: Callable[..., Node], free_port: Callable[[], int], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("key-a\n")
    admin = free_port()
    options = {"serve__admin_port": admin, "serve__admin_token": "geheim", "serve__drain_delay": 60}
    node = start(serve__api_keys_file=str(tmp_path / "keys"), traces__enabled=False, **options)
    messages: Any = [{"role": "user", "content": "Hi"}]
    ask = node.client.with_options(api_key="key-a").chat.completions.create
    with pytest.raises(openai.AuthenticationError):
        node.ask("Hi")
    headers = {"authorization": "Bearer geheim"}
    shown = [httpx.get(f"{url}/admin/speculator", headers=headers) for url in (node.url, f"http://127.0.0.1:{admin}")]
    assert [answer.status_code for answer in shown] == [404, 200]
    node.process.send_signal(signal.SIGTERM)
    eventually(lambda: httpx.get(f"{node.url}/ready").status_code == 503)
    assert ask(model=MODEL, messages=messages, max_tokens=2).choices[0].message.content
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(30) == 0


def test_a_port_in_use_names_the_setting(free_port: Callable[[], int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SettingsError, match=r"serve\.port"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_a_foreign_host_names_the_setting(free_port: Callable[[], int]) -> None:
    with pytest.raises(SettingsError, match=r"serve\.host"):
        bind("192.0.2.1", free_port())
