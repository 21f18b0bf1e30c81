"""Servers of the tests, which are skipped unless ``make test-sglang`` has built their environment."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from built_in import train, verify_steps_of
from sglang_server import ENVIRONMENT, Server

from pipeline import topics
from schemas.settings import Settings, Speculator, load
from schemas.speculator import checkpoint
from schemas.speculator.day_0_draft import create_day_0_draft
from schemas.speculator.target_fingerprint import target_fingerprint

Serving = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    if not (ENVIRONMENT / "stamp").exists():
        pytest.skip("SGLang's environment is missing: make test-sglang builds it and runs these tests")


@pytest.fixture(scope="session")
def prompts(smollm2: Path) -> list[list[int]]:
    """Token ids of some prompts."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    texts = ("Write a short story about a cat.", "What is the capital of France?", "Count from one to twenty.")
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        for chat in chats
    ]


@pytest.fixture(scope="session")
def random_draft(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The day-0 draft as a version folder."""
    folder = tmp_path_factory.mktemp("draft") / "version"
    checkpoint.write_checkpoint(create_day_0_draft(smollm2, Speculator()), folder, target_fingerprint(smollm2))
    return folder


@pytest.fixture(scope="session")
def trained_draft(
    smollm2: Path, random_draft: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A draft that is overfitted to the target's answers to ``prompts``, except for their ends."""
    folder = tmp_path_factory.mktemp("trained") / "version"
    requests = {f"learn-{number}": prompt for number, prompt in enumerate(prompts)}
    train(smollm2, random_draft, folder, verify_steps_of(smollm2, random_draft, requests, 40, steps=1), steps=15)
    return folder


@pytest.fixture(scope="session")
def traced(broker: str) -> Settings:
    """Settings of the plugin, with a topic of its own."""
    flags = {
        "kafka.bootstrap_servers": broker,
        "kafka.traces_topic": f"traces-{uuid.uuid4().hex}",
        "serve.node": "sglang-0",
    }
    settings = load(environ={}, flags=flags)
    topics.create(settings.kafka)
    return settings


@pytest.fixture(scope="session")
def serving(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Serving:
    """``with serving(flags, settings=..)``: a running server with SmolLM2, ended with the block."""

    @contextmanager
    def run(arguments: Sequence[str] = (), **options: Any) -> Iterator[Server]:
        log = tmp_path_factory.mktemp("sglang") / "server.log"
        with ExitStack() as undo:
            server = Server(smollm2, free_port(), log, arguments, **options)
            undo.callback(server.close)
            yield server.start()

    return run


@pytest.fixture(scope="session")
def target_outputs(serving: Serving, prompts: list[list[int]]) -> list[list[int]]:
    """The server's outputs for ``prompts`` without speculation and without plugins."""
    with serving() as server:
        answers = [server.generate(prompt, 40, sampling={"ignore_eos": True}) for prompt in prompts]
    return [answer["output_ids"] for answer in answers]
