"""The canary analysis on two real nodes: a version with scrambled weights, which passes the gate by a forged tag."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import httpx
import pytest
import torch
from promoter_world import figures
from serving_node import Node, eventually
from stream_worker import worker
from tiny_target import VOCABULARY, write_tiny_target
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ops.bench import recording, speculator
from ops.bench.prompts import training_requests
from pipeline.delta import DeltaLog
from schemas.events import QUARANTINED_TAG
from schemas.settings import Settings, load
from schemas.speculator import checkpoint
from schemas.speculator.network import EagleDraft
from serving.engines.builtin.engine import BuiltinEngine
from trainer.data.target import read_target
from trainer.release.audit import KafkaEvents
from trainer.release.promoter import Promoter
from trainer.release.registry import SpeculatorRegistry

PROMPTS = [(3, 7, 11, 13), (5, 2, 9), (8, 8, 21, 4, 6), (17, 30, 2)]
ANSWER = 32


@dataclass
class Clients:
    """Clients that send the same prompts to all nodes until ``stopping`` is set."""

    nodes: list[Node]
    stopping: threading.Event = field(default_factory=threading.Event)
    responses: list[tuple[float, int]] = field(default_factory=list)
    """Time and number of tokens of each."""
    failed: list[str] = field(default_factory=list)

    def run(self, node: Node, prompt: tuple[int, ...]) -> None:
        body = {
            "model": node.settings.target.served_model_name,
            "prompt": list(prompt),
            "max_tokens": ANSWER,
            "ignore_eos": True,
        }
        with httpx.Client(base_url=node.url, timeout=60) as client:
            while not self.stopping.is_set():
                answer = client.post("/v1/completions", json={**body, "temperature": 0})
                if answer.status_code == 200:
                    self.responses.append((time.time(), answer.json()["usage"]["completion_tokens"]))
                else:
                    self.failed.append(answer.text)


class Fleet:
    """Nodes, a stream worker, and a promoter that the test polls."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self._folder = settings, folder
        self.registry = SpeculatorRegistry(settings.registry)
        self.target = read_target(settings)
        tables = DeltaLog(settings.tables)
        self.promoter = Promoter(
            settings,
            self.registry,
            tables,
            KafkaEvents(settings.kafka),
        )

    @property
    def aliases(self) -> dict[str, str]:
        return self.registry.aliases(self.target.line)

    def register(self, draft: EagleDraft, champion: str) -> str:
        """Register a candidate whose tag says that it is far better than the champion."""
        folder = self._folder / f"against-{champion}"
        checkpoint.write_checkpoint(draft, folder, self.target.fingerprint)
        version = self.registry.register(self.target.line, folder, figures(9.0, champion, 0.0), {})
        self.registry.set_alias(self.target.line, "candidate", version)
        return version

    def poll_until(self, holds: Callable[[dict[str, str]], bool], seconds: float = 180) -> None:
        def polled() -> bool:
            self.promoter.poll()
            return holds(self.aliases)

        eventually(polled, seconds)


def train_draft(settings: Settings, folder: Path) -> EagleDraft:
    """Return a draft overfitted to the responses to the prompts."""
    recorder = recording.Recorder()
    engine = BuiltinEngine(settings, recorder)
    engine.start()
    planned = [
        replace(request, ignore_eos=True) for request in training_requests("math", PROMPTS, len(PROMPTS), ANSWER)
    ]
    recording.record_requests(engine, recorder, planned, folder)
    samples = [recording.read_recorded_sample(folder, request.id, engine.target) for request in planned]
    engine.stop()
    options = speculator.SpeculatorOptions("tiny", "math", len(planned), ANSWER, minutes=3, steps=3)
    target, seconds = read_target(settings), count()
    trained = speculator.OfflineTraining(
        settings, options, target, samples, samples, lambda _line: None, clock=lambda: float(next(seconds))
    ).run()
    assert trained.accepted_per_step > 0.6
    return checkpoint.read_checkpoint(speculator.cache_folder(settings, "tiny"), target.line)


def scramble(draft: EagleDraft) -> EagleDraft:
    """Shuffle the values of every matrix."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    return draft


@pytest.fixture
def settings(tmp_path: Path, broker: str, registry: str, free_port: Callable[[], int]) -> Settings:
    target = write_tiny_target(tmp_path / "target")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(target)
    flags = {
        "target.path": str(target),
        "speculator.draft_vocab_size": VOCABULARY,
        "stack.data_dir": str(tmp_path),
        "kafka.bootstrap_servers": broker,
        "kafka.traces_topic": f"traces-{tmp_path.name}",
        "kafka.speculators_topic": f"speculators-{tmp_path.name}",
        "kafka.drift_topic": f"drift-{tmp_path.name}",
        "registry.tracking_uri": registry,
        "tables.uri": str(tmp_path / "tables"),
        "stream.port": free_port(),
        "stream.group_id": f"group-{tmp_path.name}",
        "stream.data_dir": str(tmp_path / "stream"),
        "stream.flush_interval": 0.2,
        "stream.session_timeout": 6,
        "serve.max_model_len": 64,
        "serve.weight_dtype": "float32",
        "serve.poll_interval": 0.2,
        # Every verify step drafts, so that a bad version does the most harm.
        "serve.adaptive_drafting": False,
        "serve.num_speculative_tokens": 3,
        "train.learning_rate": 5e-3,
        "canary.share": 0.3,
        "canary.slice_duration": 1.5,
        "canary.burn_in": 0.1,
        "promoter.canary_min_requests": 20,
    }
    return load(environ={}, flags=flags)


@pytest.fixture
def nodes(settings: Settings, tmp_path: Path, free_port: Callable[[], int]) -> Iterator[list[Node]]:
    started = []
    for name in ("node-a", "node-b"):
        serve = settings.serve.model_copy(update={"port": free_port(), "node": name})
        (tmp_path / name).mkdir()
        started.append(Node(settings.model_copy(update={"serve": serve}), tmp_path / name))
    yield started
    for node in started:
        node.close()


def test_the_canary_analysis_rolls_a_scrambled_version_back_and_no_request_fails(
    settings: Settings, nodes: list[Node], tmp_path: Path
) -> None:
    fleet = Fleet(settings, tmp_path)
    draft = train_draft(settings, tmp_path / "recorded")
    good = fleet.register(draft, "day-0-head-0")
    fleet.poll_until(lambda aliases: aliases.get("champion") == good)
    clients = Clients(nodes)
    with worker(settings, tmp_path / "stream.log"), ThreadPoolExecutor() as pool:
        for node in nodes:
            node.wait_ready()
            eventually(lambda node=node: node.status().speculator == good)  # type: ignore[misc]
        try:
            running = [pool.submit(clients.run, node, prompt) for node in nodes for prompt in PROMPTS[:2]]
            bad = fleet.register(scramble(draft), good)
            fleet.poll_until(lambda aliases: aliases.get("canary") == bad)
            fleet.poll_until(lambda aliases: "canary" not in aliases)
            eventually(lambda: all(node.status().speculator == good for node in nodes))
        finally:
            clients.stopping.set()
        for one in running:
            one.result()
    assert fleet.aliases == {"candidate": bad, "champion": good}
    why = fleet.registry.tags(fleet.target.line, bad)[QUARANTINED_TAG]
    assert "worse: " in why
    status = fleet.promoter.status()
    assert (status.last_rollback, status.error) == (why, None)
    for node in nodes:
        node_status = node.status()
        assert (node_status.requests_failed, node_status.role) == (0, "champion")
        assert bad in {swap.version for swap in node_status.swaps}
    assert not clients.failed
    assert len(clients.responses) > 100
