"""A trainer that is killed in the middle has the losses of one that is not, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer_world import World, offline, process, until, write_target

STEPS = 60
TELLING = """
import sys
from schemas.settings import load
from trainer import train

class Telling(train.Trainer):
    def _train_step(self, batch):
        super()._train_step(batch)
        with open(sys.argv[1], "a") as file:
            file.write(f"{self._learner.steps} {float(self._figures.loss.total).hex()}\\n")

train.Trainer = Telling
train.run(load())
"""


def told(file: Path) -> list[tuple[int, str]]:
    """Steps and their losses, as far as whole lines are there."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [(int(line.split()[0]), line.split()[1]) for line in lines if line.endswith("\n")]


def test_a_killed_trainer_has_the_losses_of_one_that_was_not(tmp_path: Path, free_port: Callable[[], int]) -> None:
    write_target(tmp_path / "target")
    changed = {"optimizer": "muon", "ema_decay": 0.9, "checkpoint_interval": 0.1, "replay_half_life": 20.0}
    settings = offline(tmp_path, port=free_port(), **changed)
    world = World(settings)
    for _ in range(12):  # more commits than are read at once: the cursor moves while it trains
        world.serve(4)
    other = offline(tmp_path, port=free_port(), checkpoint_dir=str(tmp_path / "other"), **changed)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with process(other, ("-c", TELLING, str(whole)), tmp_path / "whole.log"):
        until(lambda: len(told(whole)) >= STEPS, "all steps at a stretch")
    for stop in (STEPS // 3, STEPS):
        before = len(told(cut))
        with process(settings, ("-c", TELLING, str(cut)), tmp_path / "cut.log"):
            until(lambda: told(cut)[before:] and max(told(cut))[0] >= stop, f"step {stop}")  # noqa: B023
        if before:
            assert told(cut)[before][0] > 1, "it began anew instead of going on"
    expected = dict(told(whole))
    found = [(step, loss) for step, loss in told(cut) if step in expected]
    assert {step for step, _ in found} >= set(range(1, STEPS + 1))
    assert found == [(step, expected[step]) for step, _ in found]
