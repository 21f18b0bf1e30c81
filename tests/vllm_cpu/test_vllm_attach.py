"""A node beside a vLLM server that another process has started, with a draft that is no version yet."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_node import eventually
from traced_chunks import chunks_of, verify_steps_in
from traced_drafts import loop_flags
from vllm_node import KEY, PYTHON, START_S, WHOLE

from ops.bench.serving.vllm_server import ENVIRON, draft_arguments, is_answering, mode_arguments
from ops.local.process import ONE_THREAD, Process
from pipeline import topics
from schemas.settings import Settings, load, to_environ
from schemas.speculator import checkpoint
from schemas.speculator.draft_folder import write_draft_folder
from schemas.speculator.layouts import Verifier
from schemas.status import ServeStatus
from serving.engines.node.sidecar import read_target_line
from serving.engines.vllm.node.vllm_flags import EXTENSION, MIDDLEWARE
from trainer.release.registry import SpeculatorRegistry

TOKENS = 30
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def settings(
    smollm2: Path, broker: str, registry: str, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Settings:
    folder = tmp_path_factory.mktemp("vllm-attach")
    flags = loop_flags(smollm2, broker, registry, folder, free_port) | {
        "serve.engine": "vllm",
        "serve.node": "vllm-attach",
        "serve.drafter": "eagle",
        "vllm.url": f"http://127.0.0.1:{free_port()}",
        "vllm.draft_dir": str(folder / "vllm"),
        "vllm.api_key": KEY,
        "vllm.max_capture_ratio": 1.0,
    }
    found = load(environ={}, flags=flags)
    topics.create(found.kafka)
    return found


@pytest.fixture(scope="module")
def server(
    settings: Settings, smollm2: Path, trained_draft: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    """vLLM with its own command line, as the page of vLLM shows it, and a draft of the line's shape."""
    folder, line = tmp_path_factory.mktemp("vllm-own"), read_target_line(settings).name
    own = checkpoint.read_checkpoint(trained_draft, line)
    own.norm.weight.data += 0.01
    write_draft_folder(own, folder / "draft", "vllm", Verifier(str(smollm2), (), 3))
    port = settings.vllm.url.rsplit(":", 1)[-1]
    flags = [
        str(smollm2), "--served-model-name", settings.target.served_model_name, "--port", port,
        "--max-model-len", "512", "--worker-extension-cls", EXTENSION, "--middleware", MIDDLEWARE,
        *mode_arguments("float32"), *draft_arguments(folder / "draft", 3),
    ]  # fmt: skip
    own_settings = {
        "PYTHONPATH": str(ROOT), "VLLM_SERVER_DEV_MODE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0",
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path_factory.mktemp("metrics")),
    }  # fmt: skip
    environ = {**ENVIRON, **ONE_THREAD, **to_environ(settings), **own_settings}
    running = Process("vllm", [str(PYTHON.parent / "vllm"), "serve", *flags], folder / "server.log", environ)
    running.start()
    try:
        running.wait_ready(lambda: is_answering(f"{settings.vllm.url}/health"), START_S)
        yield running
    finally:
        running.stop()


@contextmanager
def node(settings: Settings, log: Path) -> Iterator[Process]:
    """A node that attaches, once it knows the version that drafts."""
    running = Process("node", [sys.executable, "-m", "ops.cli.main", "serve"], log, to_environ(settings))
    running.start()
    try:
        running.wait_ready(lambda: is_answering(f"http://127.0.0.1:{settings.serve.port}/ready"), START_S)
        yield running
    finally:
        running.stop()


def status_of(settings: Settings) -> ServeStatus:
    return ServeStatus.model_validate(httpx.get(f"http://127.0.0.1:{settings.serve.port}/status").json())


def complete(settings: Settings, prompt: list[int], label: str) -> list[int]:
    body: dict[str, Any] = {
        "model": settings.target.served_model_name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0,
        "return_token_ids": True, "cache_salt": label, "vllm_xargs": {"aurora_label": label},
    }  # fmt: skip
    answer = httpx.post(f"{settings.vllm.url}/v1/completions", json=body | WHOLE, timeout=120).raise_for_status()
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


def test_the_servers_own_draft_serves_until_a_version_has_the_alias_and_a_killed_node_changes_nothing(
    settings: Settings,
    server: Process,
    prompts: list[list[int]],
    target_outputs: list[list[int]],
    trained_draft: Path,
    tmp_path: Path,
) -> None:
    expected, line = target_outputs[0][:TOKENS], read_target_line(settings).name
    registry = SpeculatorRegistry(settings.registry)
    with node(settings, tmp_path / "first.log") as first:
        eventually(lambda: status_of(settings).speculator == "attached")
        assert complete(settings, prompts[0], "own") == expected
        (chunk,) = chunks_of(settings.kafka, "own")
        drafted = [step for step in chunk.verify_steps if step.verify_step]
        assert {step.speculator for step in drafted} == {"attached"}
        assert first.pid is not None
        os.kill(first.pid, signal.SIGKILL)
    assert complete(settings, prompts[0], "alone") == expected
    version = registry.register(line, trained_draft, {}, {})
    try:
        with node(settings, tmp_path / "second.log"):
            eventually(lambda: status_of(settings).speculator == "attached")
            registry.set_alias(line, "champion", version)
            eventually(lambda: status_of(settings).speculator == version)
            assert complete(settings, prompts[0], "swapped") == expected
            steps = verify_steps_in(chunks_of(settings.kafka, "swapped"))
            assert {step.speculator for step in steps if step.verify_step > 1} == {version}
            assert sum(len(step.accepted) for step in steps) > 3
    finally:
        # The nodes of other tests serve the same line.
        registry.delete_alias(line, "champion")
        registry.delete(line, version)
    assert server.alive


def test_clients_cannot_call_the_development_endpoints(settings: Settings, server: Process) -> None:
    for path in ("/collective_rpc", "/start_draft_weight_update"):
        answer = httpx.post(settings.vllm.url + path, content=json.dumps({"method": "aurora_attach"}))
        assert answer.status_code == 401, path
