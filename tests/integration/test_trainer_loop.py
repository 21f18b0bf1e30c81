"""The trainer on real tables and a real registry: training, registration, clean stop, resume and outages."""

from __future__ import annotations

import json
import select
import signal
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from trainer_world import (
    HIDDEN,
    RUN_PROMOTER,
    RUN_TRAINER,
    World,
    end,
    get,
    process,
    step_of,
    train_status,
    until,
    write_target,
)

from pipeline.delta import DeltaLog
from schemas.settings import load
from schemas.speculator import checkpoint
from trainer.release.gate import HeldOutComparison
from trainer.train import Trainer

SUPPORT = Path(__file__).resolve().parents[1] / "support"
RUN_KILLED_TRAINER = ("-c", f"import sys; sys.path.append('{SUPPORT}'); import killed_trainer; killed_trainer.run()")


@pytest.fixture
def world(registry: str, broker: str, tmp_path: Path, free_port: Callable[[], int]) -> World:
    write_target(tmp_path / "target")
    flags = {
        "target.path": str(tmp_path / "target"),
        "speculator.draft_vocab_size": 32,
        "kafka.bootstrap_servers": broker,
        "kafka.speculators_topic": f"speculators-{uuid.uuid4().hex[:8]}",
        "registry.tracking_uri": registry,
        "registry.timeout": 5,
        "tables.uri": str(tmp_path / "tables"),
        "train.checkpoint_dir": str(tmp_path / "train"),
        "train.port": free_port(),
        "train.learning_rate": 5e-3,
        "train.held_out_ratio": 0.25,
        "train.max_epochs": 60,
        "train.registration_interval": 1.5,
        "train.checkpoint_interval": 1,
        "train.poll_interval": 0.1,
        "train.self_generation": 0,
        "promoter.port": free_port(),
        "promoter.poll_interval": 0.2,
        "promoter.gate_min_samples": 4,
    }
    return World(load(environ={}, flags=flags))


def test_rows_lead_to_a_champion_that_drafts_better(world: World, tmp_path: Path) -> None:
    settings, line = world.settings, world.target.line
    world.serve(60)
    with (
        process(settings, RUN_TRAINER, tmp_path / "train.log") as trainer,
        process(settings, RUN_PROMOTER, tmp_path / "promoter.log") as promoter,
    ):
        until(lambda: world.registry.aliases(line).get("champion"), "a champion")
        world.serve(30)
        until(lambda: int(world.registry.aliases(line)["champion"]) >= 2, "a second champion")
        until(lambda: (s := train_status(settings)) and len(s.registered) >= 2, "its status")
        status = train_status(settings)
        assert status is not None
        assert status.error is None
        assert status.registered[:2] == ["1", "2"]
        assert status.table_version_read > 0
        assert status.acceptance_length is not None
        assert b"aurora_train_steps_total" in get(settings.train.port, "/metrics")
        assert b'aurora_promoter_alias_moves_total{alias="champion"}' in get(settings.promoter.port, "/metrics")
        with pytest.raises(OSError, match="404"):
            get(settings.train.port, "/elsewhere")
        assert (end(trainer), end(promoter)) == (0, 0)

    champion = world.registry.aliases(line)["champion"]
    tags = world.registry.tags(line, champion)
    figures = HeldOutComparison.from_tags(tags)
    assert figures.gain_low is not None
    assert figures.gain_low > 0
    assert figures.samples >= settings.promoter.gate_min_samples
    assert [(on.label, on.samples) for on in figures.labels] == [("", figures.samples)]
    assert {"line", "target", "parent", "tables", "code", "metrics", "held_out"} <= tags.keys()
    assert world.registry.tags(line, "1")["parent"] == "day-0-head-0"
    assert world.registry.tags(line, "2")["parent"] == "1"
    assert json.loads(tags["tables"])["accepted"] > 0
    draft = checkpoint.read_checkpoint(world.registry.download(line, champion, tmp_path / "champion"), line)
    assert not torch.equal(draft.fc.weight, world.target.day_0.fc.weight)
    rows = DeltaLog(settings.tables).read_in_order("promotions").to_pylist()
    moves = [row for row in rows if row["line"] == line and row["alias"] == "champion"]
    champions = [row["to_version"] for row in moves]
    # A promoter that started late has skipped the first versions.
    assert champions == sorted(champions, key=int)
    assert [row["from_version"] for row in moves] == [None, *champions[:-1]]
    assert all(row["actor"] == "promoter" for row in moves)


def test_a_stopped_or_killed_trainer_resumes_from_its_checkpoint(world: World, tmp_path: Path) -> None:
    settings, log = world.settings, tmp_path / "train.log"
    world.serve(40)
    with process(settings, RUN_TRAINER, log) as trainer:
        until(lambda: step_of(settings) >= 5, "steps")
        assert end(trainer) == 0
    announced = {row["table"]: row["version"] for row in world.tables.read("cursors").to_pylist()}
    assert announced.keys() == {"accepted", "rejected"}, "its lease exists from the start"
    newest = max((Path(settings.train.checkpoint_dir) / world.target.line).iterdir())
    stopped_at = int(newest.name.removeprefix("step-"))
    assert stopped_at >= 5

    with process(settings, RUN_TRAINER, log) as trainer:
        until(lambda: step_of(settings) >= stopped_at, "the step that it stopped at")
        seen = train_status(settings)
        assert seen is not None
        assert seen.tokens_seen >= stopped_at * 20
        world.serve(40)
        until(
            lambda: max((Path(settings.train.checkpoint_dir) / world.target.line).glob("step-*")) > newest,
            "a checkpoint",
        )
        trainer.kill()
        trainer.wait()
    with process(settings, RUN_TRAINER, log) as trainer:
        until(lambda: step_of(settings) > stopped_at, "steps after the kill")
        until(
            lambda: (s := train_status(settings)) and s.table_version_read == s.table_version_latest,
            "everything to be read",
        )
        assert end(trainer) == 0


def test_a_registration_that_a_kill_interrupted_is_completed(world: World, tmp_path: Path) -> None:
    settings, line, log = world.settings, world.target.line, tmp_path / "train.log"
    world.serve(60)
    with process(settings, RUN_KILLED_TRAINER, log) as killed:
        assert killed.wait(120) == -signal.SIGKILL
    assert [version.number for version in world.registry.versions(line)] == ["1"]
    assert world.registry.aliases(line) == {}
    with process(settings, RUN_TRAINER, log) as trainer:
        until(lambda: len(parents_at_starts(log)) == 2, "the start")
        assert world.registry.aliases(line)["candidate"]
        assert end(trainer) == 0
    assert parents_at_starts(log) == ["day-0-head-0", "1"]


def parents_at_starts(log: Path) -> list[str]:
    entries = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [entry["parent"] for entry in entries if entry["event"] == "training_started"]


class Gate:
    """A proxy that forwards connections to the registry while it is open."""

    def __init__(self, uri: str) -> None:
        self._to = (urlsplit(uri).hostname or "", urlsplit(uri).port or 0)
        self.open = False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                if self.open:
                    threading.Thread(target=self._forward, args=(client,), daemon=True).start()
                else:
                    client.close()

    def _forward(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._to) as server, suppress(OSError):
            while self.open:
                for ready in select.select([client, server], [], [], 0.2)[0]:
                    if not (data := ready.recv(1 << 16)):
                        return
                    (server if ready is client else client).sendall(data)


def test_training_continues_while_the_registry_is_unreachable(world: World, registry: str) -> None:
    gate = Gate(registry)
    flags = {f"{section}.{key}": v for section, of in world.settings.model_dump().items() for key, v in of.items()}
    settings = load(environ={}, flags={**flags, "registry.tracking_uri": gate.uri})
    stopping = threading.Event()
    trainer = Trainer(settings, world.target, stopping)
    thread = threading.Thread(target=trainer.run, daemon=True)
    world.serve(60)
    thread.start()
    try:
        # Without a checkpoint the trainer has to ask for the champion, so it waits.
        until(lambda: "registry.tracking_uri" in (trainer.status().error or ""), "the first failure")
        assert trainer.status().step == 0
        gate.open = True
        until(lambda: trainer.status().step > 0, "training")
        assert trainer.status().error is None
        gate.open = False
        until(lambda: "registry.tracking_uri" in (trainer.status().error or ""), "a failure to register")
        world.serve(20)
        until(
            lambda: trainer.status().table_version_read == world.tables.version("accepted"), "the new rows to be read"
        )
        failed_at = trainer.status().step
        world.serve(20)
        until(lambda: trainer.status().step > failed_at, "steps without a registry")
        gate.open = True
        until(lambda: trainer.status().registered, "a version")
        until(lambda: trainer.status().error is None, "no error")
    finally:
        stopping.set()
        thread.join(60)
        gate.close()
    assert not thread.is_alive()
    assert world.registry.aliases(world.target.line)["candidate"]


def test_a_first_start_uses_the_champion_of_its_line(world: World, tmp_path: Path) -> None:
    line, draft = world.target.line, world.target.new_draft()
    with torch.no_grad():
        draft.norm.weight.fill_(1.5)
    checkpoint.write_checkpoint(draft, tmp_path / "version", world.target.fingerprint)
    version = world.registry.register(line, tmp_path / "version", {}, {})
    world.registry.set_alias(line, "champion", version)
    stopping = threading.Event()
    trainer = Trainer(world.settings, world.target, stopping)
    trainer._start()
    assert trainer._lineage.parent == version
    assert torch.equal(trainer._learner.draft.norm.weight, draft.norm.weight)
    assert torch.equal(world.target.day_0.norm.weight, torch.ones(HIDDEN))
