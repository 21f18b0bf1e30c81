"""The trainer changes the draft vocabulary within a line, the promoter moves it, and a rollback returns to the old."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from trainer_world import (
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
from typer.testing import CliRunner

from ops.cli.main import app
from schemas.settings import load
from schemas.speculator.checkpoint import line_name
from trainer.data.draft_vocabulary import sum_halves
from trainer.loop.checkpoints import Checkpoints, TrainState
from trainer.loop.learner import load_draft
from trainer.release.evaluation import read_draft
from trainer.release.gate import HeldOutComparison

FIRSTS = (16, 3, 29)
"""Requests that begin with these tokens use twelve tokens, four of them among the lowest sixteen."""
USED = {16, 25, 28, 19, 3, 24, 21, 0, 29, 26, 5, 8}


@pytest.fixture
def flags(registry: str, broker: str, tmp_path: Path, free_port: Callable[[], int]) -> dict[str, object]:
    write_target(tmp_path / "target")
    return {
        "target.path": str(tmp_path / "target"),
        "speculator.draft_vocab_size": 16,
        "kafka.bootstrap_servers": broker,
        "kafka.speculators_topic": f"speculators-{uuid.uuid4().hex[:8]}",
        "registry.tracking_uri": registry,
        "registry.timeout": 5,
        "tables.uri": str(tmp_path / "tables"),
        "train.checkpoint_dir": str(tmp_path / "train"),
        "train.port": free_port(),
        "train.learning_rate": 5e-3,
        "train.held_out_ratio": 0.25,
        "train.max_epochs": 400,
        "train.registration_interval": 1.0,
        "train.checkpoint_interval": 0.5,
        "train.poll_interval": 0.1,
        "train.self_generation": 0,
        "promoter.port": free_port(),
        "promoter.poll_interval": 0.2,
        "promoter.gate_min_samples": 4,
    }


def vocabulary_of(world: World, version: str) -> list[int]:
    return read_draft(world.registry, world.target.line, version).t2d.nonzero().flatten().tolist()


def champion_of(world: World) -> str:
    return world.registry.aliases(world.target.line).get("champion", "")


def ids_of(checkpoint: Path, world: World) -> list[int]:
    return load_draft(checkpoint, world.target.day_0.shape).t2d.nonzero().flatten().tolist()


def test_a_vocabulary_by_counts_is_trained_promoted_and_rolled_back_in_the_same_line(
    flags: dict[str, object], tmp_path: Path
) -> None:
    fixed = load(environ={}, flags=flags | {"train.draft_vocab_min_coverage": 0})
    counting = load(environ={}, flags=flags | {"train.draft_vocab_min_tokens": 100})
    world, log = World(counting), tmp_path / "train.log"
    line = world.target.line
    world.serve(60, FIRSTS)
    with process(counting, RUN_PROMOTER, tmp_path / "promoter.log") as promoter:
        with process(fixed, RUN_TRAINER, log) as trainer:
            until(lambda: champion_of(world), "a champion with the lowest ids")
            status = train_status(fixed)
            assert status is not None
            assert status.draft_vocab_coverage == pytest.approx(4 / 12, abs=0.05)
            assert end(trainer) == 0
        assert vocabulary_of(world, champion_of(world)) == list(range(16))

        with process(counting, RUN_TRAINER, log) as trainer:
            until(lambda: set(vocabulary_of(world, champion_of(world))) >= USED, "a champion with the counted ids")
            assert end(promoter) == 0
            metrics = get(counting.train.port, "/metrics")
            assert b"aurora_train_draft_vocab_changes_total 1.0" in metrics
            assert b"aurora_train_draft_vocab_coverage_ratio 1.0" in metrics
            checkpoints = Checkpoints(Path(counting.train.checkpoint_dir) / line, TrainState)

            def is_saved() -> bool:
                found = checkpoints.read_newest()
                return found is not None and set(ids_of(found[1], world)) >= USED

            until(is_saved, "a checkpoint with the counted ids")
            trainer.kill()
            trainer.wait()
    saved = checkpoints.read_newest()
    assert saved is not None
    assert sum(sum_halves(saved[0].data_loader.token_counts).values()) > 100
    with process(counting, RUN_TRAINER, log) as trainer:
        until(lambda: step_of(counting) >= saved[0].step, "the trainer after the kill")
        until(lambda: (s := train_status(counting)) and s.draft_vocab_coverage == 1.0, "its coverage")
        assert b"aurora_train_draft_vocab_changes_total 0.0" in get(counting.train.port, "/metrics")
        assert end(trainer) == 0

    aliases = world.registry.aliases(line)
    new, before = aliases["champion"], aliases["previous"]
    draft = read_draft(world.registry, line, new)
    assert line == world.registry.tags(line, new)["line"] != line_name(world.target.fingerprint, draft.shape, draft.d2t)
    compared = HeldOutComparison.from_tags(world.registry.tags(line, new))
    assert compared.gain_low is not None
    assert compared.gain_low > 0
    assert vocabulary_of(world, compared.champion) == vocabulary_of(world, before) == list(range(16))
    given = [f"--set={key}={value}" for key, value in flags.items() if not key.startswith(("train", "promoter"))]
    result = CliRunner().invoke(app, ["versions", "rollback", f"--line={line}", "--why", "test", *given])
    assert result.exit_code == 0, result.output
    assert champion_of(world) == before
