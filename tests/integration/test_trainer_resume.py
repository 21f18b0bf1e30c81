"""A killed and resumed trainer has bitwise the losses of an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer_world import World, offline, process, until, write_target

STEPS = 60
LOGGING_TRAINER = """
import sys
from schemas.settings import load
from trainer import train

class LoggingTrainer(train.Trainer):
    def _train_step(self, batch):
        super()._train_step(batch)
        with open(sys.argv[1], "a") as file:
            file.write(f"{self._learner.steps} {float(self._figures.loss.total).hex()}\\n")

train.Trainer = LoggingTrainer
train.run(load())
"""


def read_losses(file: Path) -> list[tuple[int, str]]:
    """Return steps and losses of all complete lines."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [(int(line.split()[0]), line.split()[1]) for line in lines if line.endswith("\n")]


def test_a_killed_trainer_resumes_with_bitwise_equal_losses(tmp_path: Path, free_port: Callable[[], int]) -> None:
    write_target(tmp_path / "target")
    changed = {"optimizer": "muon", "ema_decay": 0.9, "checkpoint_interval": 0.1, "replay_half_life": 20.0}
    settings = offline(tmp_path, port=free_port(), **changed)
    world = World(settings)
    for _ in range(12):  # more commits than are read at once: the cursor moves while it trains
        world.serve(4)
    other = offline(tmp_path, port=free_port(), checkpoint_dir=str(tmp_path / "other"), **changed)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with process(other, ("-c", LOGGING_TRAINER, str(whole)), tmp_path / "whole.log"):
        until(lambda: len(read_losses(whole)) >= STEPS, "all steps")
    for stop in (STEPS // 3, STEPS):
        before = len(read_losses(cut))
        with process(settings, ("-c", LOGGING_TRAINER, str(cut)), tmp_path / "cut.log"):
            until(lambda: read_losses(cut)[before:] and max(read_losses(cut))[0] >= stop, f"step {stop}")  # noqa: B023
        if before:
            assert read_losses(cut)[before][0] > 1, "it started over instead of resuming"
    expected = dict(read_losses(whole))
    found = [(step, loss) for step, loss in read_losses(cut) if step in expected]
    assert {step for step, _ in found} >= set(range(1, STEPS + 1))
    assert found == [(step, expected[step]) for step, _ in found]
