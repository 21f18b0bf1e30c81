"""The whole loop around SGLang's own server, as its users start it: what it serves is learned from, and serves it."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sglang_server import PYTHON, Server
from stream_worker import worker
from trainer_world import RUN_PROMOTER, RUN_TRAINER, process

from schemas.settings import Settings, load
from schemas.status import ServeStatus
from serving.engines.sglang.node.sidecar import read_target_line
from trainer.release.registry import SpeculatorRegistry

TOKENS = 32
LEARNED = 1.4
"""SGLang's own ``spec_accepted_per_step``, which counts the token that every verify step gives; 1 where no draft is
accepted.
"""
LEARN_S = 300


@dataclass
class Node:
    """The launcher, and the server that it has started."""

    server: Server
    settings: Settings

    @property
    def status(self) -> ServeStatus:
        answer = httpx.get(f"http://127.0.0.1:{self.settings.serve.port}/status")
        return ServeStatus.model_validate(answer.json())

    def ask(self, prompts: list[list[int]]) -> list[Any]:
        """Answers to all prompts, decoded together."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda prompt: self.server.generate(prompt, TOKENS), prompts))


def accepted_per_step(answers: list[Any]) -> float:
    return statistics.mean(answer["meta_info"]["spec_accepted_per_step"] for answer in answers)


@pytest.fixture(scope="module")
def settings(
    smollm2: Path, broker: str, registry: str, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Settings:
    """A line of the test's own: that of a smaller draft vocabulary."""
    folder = tmp_path_factory.mktemp("loop")
    flags = {
        "target.path": str(smollm2),
        "speculator.draft_vocab_size": 8000,
        "kafka.bootstrap_servers": broker,
        "kafka.traces_topic": f"traces-{folder.name}",
        "kafka.speculators_topic": f"speculators-{folder.name}",
        "kafka.drift_topic": f"drift-{folder.name}",
        "registry.tracking_uri": registry,
        "tables.uri": str(folder / "tables"),
        "serve.engine": "sglang",
        "serve.port": free_port(),
        "serve.num_speculative_tokens": 3,
        "serve.poll_interval": 0.5,
        "sglang.python": str(PYTHON),
        "sglang.draft_dir": str(folder / "sglang"),
        "stream.port": free_port(),
        "stream.group_id": f"group-{folder.name}",
        "stream.data_dir": str(folder / "stream"),
        "stream.flush_interval": 0.5,
        "train.checkpoint_dir": str(folder / "train"),
        "train.port": free_port(),
        "train.learning_rate": 3e-3,
        "train.warmup_steps": 1,
        "train.batch_size": 3,
        "train.replay_batch_size": 2,
        "train.max_epochs": 60,
        "train.held_out_ratio": 0.25,
        "train.registration_interval": 15,
        "train.poll_interval": 0.2,
        "promoter.port": free_port(),
        "promoter.poll_interval": 0.5,
        "promoter.gate_min_samples": 1,
        "promoter.watch_duration": 0,
    }
    return load(environ={}, flags=flags)


@pytest.fixture(scope="module")
def node(serving: Any, settings: Settings) -> Iterator[Node]:
    with serving(settings=settings, launched=True) as server:
        yield Node(server, settings)


def test_a_target_without_a_speculator_is_served_with_the_draft_of_day_0(
    node: Node, prompts: list[list[int]], said_by_target: list[list[int]]
) -> None:
    answers = node.ask(prompts)
    for answer, whole in zip(answers, said_by_target, strict=True):
        said = answer["output_ids"]
        assert said == whole[: len(said)]
    assert accepted_per_step(answers) < 1.15
    assert {answer["meta_info"]["weight_version"] for answer in answers} == {"day-0-head-0"}
    deadline = time.monotonic() + 30
    while not (status := node.status).engine_up:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert (status.speculator, status.line) == ("day-0-head-0", read_target_line(node.settings).name)


def test_what_it_serves_is_learned_from_and_serves_it(
    node: Node, prompts: list[list[int]], said_by_target: list[list[int]], tmp_path: Path
) -> None:
    settings, line = node.settings, read_target_line(node.settings).name
    before = accepted_per_step(node.ask(prompts))
    with (
        worker(settings, tmp_path / "stream.log"),
        process(settings, RUN_TRAINER, tmp_path / "train.log"),
        process(settings, RUN_PROMOTER, tmp_path / "promoter.log"),
    ):
        deadline = time.monotonic() + LEARN_S
        while accepted_per_step(answers := node.ask(prompts)) < LEARNED:
            assert time.monotonic() < deadline, f"{accepted_per_step(answers):.2f} after {LEARN_S} s"
    assert before < 1.15
    for answer, whole in zip(answers, said_by_target, strict=True):
        said = answer["output_ids"]
        assert said == whole[: len(said)]
    status = node.status
    print(f"from {before:.2f} to {accepted_per_step(answers):.2f} with {[swap.version for swap in status.swaps]}")
    assert status.swaps
    assert status.registry_error is None
    assert status.rows_published > 0
    assert int(SpeculatorRegistry(settings.registry).aliases(line)["champion"]) >= int(status.swaps[-1].version)
    assert "sglang:spec_accepted_per_step" in node.server.client.get("/metrics").text


def test_it_ends_when_it_is_told_to_with_the_server(node: Node) -> None:
    launcher = node.server.process
    assert launcher.pid is not None
    os.kill(launcher.pid, signal.SIGTERM)
    deadline = time.monotonic() + 40
    while launcher.alive:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert launcher.exit_code == 0
    assert not node.server.ready()
