"""A node whose engine fails answers its requests with the error, and exits for its supervisor."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from echo_engine import byte_tokenizer
from tiny_target import VOCABULARY, write_tiny_target

from ops.local.parts import Part
from ops.local.process import Process
from ops.local.supervisor import State, Supervisor
from schemas.settings import load, to_environ

FATAL_TOKEN = VOCABULARY - 1
NODE = f"""
from schemas.settings import load
from serving.engines.builtin.target import Target
from serving.node import run

forward = Target.forward

def fail(self, tokens_T, batch):
    if {FATAL_TOKEN} in tokens_T.tolist():
        raise RuntimeError("out of memory")
    return forward(self, tokens_T, batch)

Target.forward = fail
run(load())
"""


@pytest.fixture
def process(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[tuple[Process, str]]:
    folder = write_tiny_target(tmp_path / "target")
    byte_tokenizer().save_pretrained(folder)
    port = free_port()
    flags = {
        "target.path": str(folder),
        "speculator.draft_vocab_size": VOCABULARY,
        "traces.enabled": False,
        "registry.tracking_uri": f"sqlite:///{tmp_path / 'none.db'}",
        "serve.drafter": "suffix",
        "target.served_model_name": "tiny",
        "serve.port": port,
        "serve.max_model_len": 96,
        "serve.drain_delay": 60,
    }
    environ = to_environ(load(environ={}, flags=flags)) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = Process("serve", [sys.executable, "-c", NODE], tmp_path / "serve.log", environ)
    yield process, f"http://127.0.0.1:{port}"
    process.stop()


def complete(url: str, token: int) -> httpx.Response:
    body = {"model": "tiny", "prompt": [1, token], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def is_ready(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    return False


def test_a_failed_engine_ends_the_process_and_the_supervisor_restarts_it(process: tuple[Process, str]) -> None:
    node, url = process
    said: list[str] = []
    supervisor = Supervisor([Part("serve", node, lambda: is_ready(url), timeout_s=120)], said.append)
    supervisor.start()
    assert complete(url, 5).status_code == 200
    failed = complete(url, FATAL_TOKEN)
    assert failed.status_code == 500
    assert "out of memory" in failed.json()["error"]["message"]
    tick_until(supervisor, lambda: supervisor.parts["serve"].state is State.DOWN)
    assert "died with code 1" in said[-1]
    tick_until(supervisor, lambda: supervisor.ready)
    assert complete(url, 5).status_code == 200


def tick_until(supervisor: Supervisor, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        supervisor.tick()
        time.sleep(0.05)
