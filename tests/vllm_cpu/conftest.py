"""vLLM's own server and our node with the same target; skipped unless ``make test-vllm`` has built the environment."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest
import traced_drafts
from serving_node import MODEL, Node
from vllm_node import WHOLE

from ops.bench.serving.vllm_server import ENVIRONMENT, VllmServer, find_version, mode_arguments
from ops.local.process import ONE_THREAD
from schemas.settings import load

MAX_LEN = 512

RunClient = Callable[[Sequence[str]], str]
prompts = traced_drafts.prompts
random_draft, trained_draft = traced_drafts.random_draft, traced_drafts.trained_draft


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    if find_version() is None:
        pytest.skip("vLLM's environment is missing: make test-vllm builds it and runs these tests")


@pytest.fixture(scope="session")
def node(smollm2: Path, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Our node, with the day-0 draft."""
    flags = {
        "target.path": str(smollm2),
        "traces.enabled": False,
        "registry.tracking_uri": f"http://127.0.0.1:{free_port()}",
        "serve.port": free_port(),
        "serve.max_model_len": MAX_LEN,
        "serve.weight_dtype": "float32",
    }
    node = Node(load(environ={}, flags=flags), tmp_path_factory.mktemp("node"))
    try:
        node.wait_ready()
        yield node
    finally:
        node.close()


@pytest.fixture(scope="session")
def vllm(smollm2: Path, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """vLLM without speculation, in the type in which the node sums."""
    arguments = [*mode_arguments("float32"), "--max-model-len", str(MAX_LEN), "--max-num-seqs", "8"]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    # Under the node's name, so that a body is the same for both.
    server = VllmServer(smollm2, free_port(), log, [*arguments, "--served-model-name", MODEL])
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def target_outputs(vllm: VllmServer, prompts: list[list[int]]) -> list[list[int]]:
    """vLLM's answers without speculation and without our extension."""

    def ask(prompt: list[int]) -> list[int]:
        body = {"prompt": prompt, "max_tokens": 120, "temperature": 0, "return_token_ids": True, "model": MODEL}
        answer = httpx.post(f"{vllm.url}/v1/completions", json=body | WHOLE, timeout=120).raise_for_status()
        found: list[int] = answer.json()["choices"][0]["token_ids"]
        return found

    return [ask(prompt) for prompt in prompts]


@pytest.fixture(scope="session")
def run_client(tmp_path_factory: pytest.TempPathFactory) -> RunClient:
    """Runs a program of vLLM's environment; returns what it prints. An error of it is the test's."""
    environ = ONE_THREAD | {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OPENAI_API_KEY": "none",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }

    def run(arguments: Sequence[str]) -> str:
        command = [str(ENVIRONMENT / "bin" / arguments[0]), *arguments[1:]]
        ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
        return ran.stdout

    return run
