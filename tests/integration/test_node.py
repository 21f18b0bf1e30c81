"""A whole node, as a process, with the real model: it serves, traces, swaps under load, and ends cleanly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from schemas.settings import Settings, SettingsError, load, to_environ
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import shape_for_target
from schemas.speculator.network import random_draft
from schemas.status import ServeStatus
from schemas.trace import Chunk, decode
from serving.node import _bind
from trainer.registry import SpeculatorRegistry

MODEL = "smollm2-135m-instruct"
_LONG = "Write a long story about a dragon and a lighthouse."
_COMMAND = "from schemas.settings import load; from serving.node import run; run(load())"


class Node:
    """``aurora serve`` in a process of its own."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.log = folder / "serve.log"
        self.url = f"http://127.0.0.1:{settings.serve.port}"
        environ = {**to_environ(settings), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND], env=_without_settings() | environ, stderr=log, stdout=log
            )
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with suppress(httpx.HTTPError):
                return httpx.get(f"{self.url}/ready").status_code == 200
            return False

        eventually(ready, 120)

    def ask(self, content: str, **options: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        options = {"temperature": 0, "max_tokens": 24} | options
        return self.client.chat.completions.create(model=MODEL, messages=messages, **options)  # type: ignore[call-overload]

    def status(self) -> ServeStatus:
        return ServeStatus.model_validate(httpx.get(f"{self.url}/status").json())

    def end(self) -> dict[str, Any]:
        """Send SIGTERM; gives what the node logged last about its traces."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0, self.log.read_text()
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        closed: dict[str, Any] = next(line for line in lines if line["event"] == "traces_closed")
        return closed


@pytest.fixture
def start(smollm2: Path, tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Callable[..., Node]]:
    """Starts a node with the given flags; ends it when the test does."""
    nodes: list[Node] = []

    def make(**flags: Any) -> Node:
        nowhere = {"kafka.bootstrap": f"127.0.0.1:{free_port()}", "registry.uri": f"http://127.0.0.1:{free_port()}"}
        ours = {"target.path": str(smollm2), "serve.port": free_port(), "serve.max_tokens": 256, "serve.poll_s": 0.2}
        named = {name.replace("__", "."): value for name, value in flags.items()}
        nodes.append(Node(load(environ={}, flags=nowhere | ours | named), tmp_path))
        nodes[-1].wait_ready()
        return nodes[-1]

    yield make
    for node in nodes:
        node.client.close()
        node.process.kill()
        node.process.wait()


def _without_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("AURORA_")}


def eventually(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
    assert answer.aurora["speculators"] == ["random-0"]
    eventually(lambda: node.status().registry_error is not None)
    status = node.status()
    assert (status.finished, status.failed, status.speculator) == (1, 0, "random-0")
    assert status.rows_captured == status.rows_pending == answer.aurora["rounds"] + 1
    closed = node.end()
    assert (closed["captured"], closed["published"]) == (status.rows_captured, 0)
    assert sum(closed["shed"].values()) == status.rows_captured


def test_every_round_is_traced_and_a_swap_under_load_changes_no_answer(
    start: Callable[..., Node], broker: str, registry: str, smollm2: Path, tmp_path: Path
) -> None:
    topic = make_topic(broker)
    node = start(kafka__bootstrap=broker, kafka__traces_topic=topic, registry__uri=registry)
    before = node.ask(_LONG, max_tokens=16)

    config = json.loads((smollm2 / "config.json").read_text())
    draft = random_draft(shape_for_target(config, node.settings.speculator.draft_vocabulary), seed=9)
    status = node.status()
    checkpoint.write(draft, tmp_path / "version", status.target)
    trainer = SpeculatorRegistry(node.settings.registry)
    version = trainer.register(status.line, tmp_path / "version", {}, {})

    answers: list[Any] = []
    streams = [threading.Thread(target=lambda: answers.append(node.ask(_LONG, max_tokens=120))) for _ in range(2)]
    for stream in streams:
        stream.start()
    eventually(lambda: node.status().running == 2)
    trainer.point(status.line, "champion", version)
    for stream in streams:
        stream.join()

    (swap,) = node.status().swaps
    assert (swap.version, swap.in_flight) == (version, 2)
    assert [a.aurora["speculators"] for a in answers] == [["random-0", version]] * 2
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
    assert sum(len(c.rounds) for c in chunks) == closed["published"] == closed["captured"]
    for name, answer in traced.items():
        rounds = [r for c in chunks if c.envelope.request == name for r in c.rounds]
        verified = [r for r in rounds if r.round > 0]
        assert len(verified) == answer.aurora["rounds"]
        assert sum(len(r.draft_tokens) for r in verified) == answer.aurora["drafted"]
        assert list(dict.fromkeys(r.speculator for r in verified)) == answer.aurora["speculators"]


def test_a_node_told_to_end_finishes_the_answer_that_it_gives(start: Callable[..., Node]) -> None:
    node = start()
    stream = iter(node.ask("Tell me about the sea.", max_tokens=12, stream=True))
    next(stream)
    node.process.send_signal(signal.SIGTERM)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")
    assert node.process.wait(30) == 0


def test_a_port_in_use_names_the_setting(free_port: Callable[[], int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SettingsError, match=r"serve\.port"):
        _bind("127.0.0.1", taken.getsockname()[1])


def test_a_host_that_is_not_ours_names_the_setting(free_port: Callable[[], int]) -> None:
    with pytest.raises(SettingsError, match=r"serve\.host"):
        _bind("192.0.2.1", free_port())
