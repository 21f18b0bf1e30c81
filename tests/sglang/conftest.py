"""Servers of the tests, which are skipped unless ``make test-sglang`` has built their environment."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import traced_drafts
from sglang_server import ENVIRONMENT, Server

from pipeline import topics
from schemas.settings import Settings, load

Serving = Callable[..., Any]
prompts = traced_drafts.prompts
random_draft, trained_draft = traced_drafts.random_draft, traced_drafts.trained_draft


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    if not (ENVIRONMENT / "stamp").exists():
        pytest.skip(f"{ENVIRONMENT.name} is missing: make test-sglang builds it and runs these tests")


@pytest.fixture(scope="session")
def traced(broker: str) -> Settings:
    """Settings of the plugin, with a topic of its own."""
    flags = {
        "kafka.bootstrap_servers": broker,
        "kafka.traces_topic": f"traces-{uuid.uuid4().hex}",
        "serve.node": "sglang-0",
        "serve.drafter": "eagle",
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
