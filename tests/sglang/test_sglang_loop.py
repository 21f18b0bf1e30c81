"""The whole loop around SGLang's own server, started as a user does: its traces train the versions that it serves."""

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
from traced_drafts import loop_flags
from trainer_world import RUN_PROMOTER, RUN_TRAINER, process

from schemas.hash_sampling import prompt_key
from schemas.settings import Settings, load
from schemas.status import ServeStatus
from serving.engines.node.sidecar import read_target_line
from trainer.data.held_out import is_held_out
from trainer.release.registry import SpeculatorRegistry

TOKENS = 32
LEARNED = 1.4
"""SGLang's own ``spec_accept_length``: bonus token included; 1 without any accepted draft token."""
TRAIN_TIMEOUT_S = 420
HELD_OUT_PROMPTS = 6
"""The gate needs several prompts, which differ, for the bounds of a gain."""


@dataclass
class Node:
    """The launcher and its server."""

    server: Server
    settings: Settings

    @property
    def status(self) -> ServeStatus:
        answer = httpx.get(f"http://127.0.0.1:{self.settings.serve.port}/status")
        return ServeStatus.model_validate(answer.json())

    def ask(self, prompts: list[list[int]]) -> list[Any]:
        """Return the answers to all prompts, decoded concurrently."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda prompt: self.server.generate(prompt, TOKENS), prompts))


def acceptance_length(answers: list[Any]) -> float:
    return statistics.mean(answer["meta_info"]["spec_accept_length"] for answer in answers)


@pytest.fixture(scope="module")
def settings(
    smollm2: Path, broker: str, registry: str, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Settings:
    """A line of the test's own, by a smaller draft vocabulary."""
    folder = tmp_path_factory.mktemp("loop")
    flags = loop_flags(smollm2, broker, registry, folder, free_port) | {
        "speculator.draft_vocab_size": 8000,
        "serve.engine": "sglang",
        "serve.drafter": "eagle",
        "sglang.python": str(PYTHON),
        "sglang.draft_dir": str(folder / "sglang"),
    }
    return load(environ={}, flags=flags)


@pytest.fixture(scope="module")
def node(serving: Any, settings: Settings) -> Iterator[Node]:
    with serving(settings=settings, launched=True) as server:
        yield Node(server, settings)


def test_a_target_without_a_speculator_is_served_with_the_day_0_draft(
    node: Node, prompts: list[list[int]], target_outputs: list[list[int]]
) -> None:
    answers = node.ask(prompts)
    for answer, whole in zip(answers, target_outputs, strict=True):
        output = answer["output_ids"]
        assert output == whole[: len(output)]
    assert acceptance_length(answers) < 1.15
    assert {answer["meta_info"]["weight_version"] for answer in answers} == {"day-0-head-0"}
    drafted = node.server.metric("aurora_sglang_draft_tokens_total")
    again = node.ask(prompts)
    drafted = node.server.metric("aurora_sglang_draft_tokens_total") - drafted
    # The server drafts one token in half of the steps, to notice a better version.
    assert 0 < drafted < 0.8 * sum(answer["meta_info"]["spec_verify_ct"] for answer in again)
    deadline = time.monotonic() + 30
    while not (status := node.status).engine_up:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert (status.speculator, status.line) == ("day-0-head-0", read_target_line(node.settings).name)


def test_its_traces_train_a_version_that_it_serves(
    node: Node, prompts: list[list[int]], target_outputs: list[list[int]], tmp_path: Path
) -> None:
    settings, line = node.settings, read_target_line(node.settings).name
    share = settings.train.held_out_ratio
    learned = [i for i, prompt in enumerate(prompts) if not is_held_out(prompt_key(prompt), share)]
    prompts, outputs = [prompts[i] for i in learned], [target_outputs[i] for i in learned]
    line_break = prompts[0][-1]
    variants = ([line_break] * number + prompts[0] for number in range(100))
    compared_on = [prompt for prompt in variants if is_held_out(prompt_key(prompt), share)][:HELD_OUT_PROMPTS]
    before = acceptance_length(node.ask(prompts))
    with (
        worker(settings, tmp_path / "stream.log"),
        process(settings, RUN_TRAINER, tmp_path / "train.log"),
        process(settings, RUN_PROMOTER, tmp_path / "promoter.log"),
    ):
        deadline = time.monotonic() + TRAIN_TIMEOUT_S
        while acceptance_length(answers := node.ask([*prompts, *compared_on])[: len(prompts)]) < LEARNED:
            assert time.monotonic() < deadline, f"{acceptance_length(answers):.2f} after {TRAIN_TIMEOUT_S} s"
    assert before < 1.15
    for answer, whole in zip(answers, outputs, strict=True):
        output = answer["output_ids"]
        assert output == whole[: len(output)]
    status = node.status
    print(f"from {before:.2f} to {acceptance_length(answers):.2f} with {[swap.version for swap in status.swaps]}")
    assert status.swaps
    assert status.registry_error is None
    assert status.rows_published > 0
    assert int(SpeculatorRegistry(settings.registry).aliases(line)["champion"]) >= int(status.swaps[-1].version)
    assert "sglang:spec_accept_length" in node.server.client.get("/metrics").text


def test_sigterm_ends_the_launcher_and_the_server(node: Node) -> None:
    launcher = node.server.process
    assert launcher.pid is not None
    os.kill(launcher.pid, signal.SIGTERM)
    deadline = time.monotonic() + 40
    while launcher.alive:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert launcher.exit_code == 0
    assert not node.server.ready()
