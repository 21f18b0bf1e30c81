"""The divergence guard rolls back to the last good checkpoint, and a diverged draft is not registered."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainer_world import World, offline, write_target

from schemas.settings import Settings
from trainer.train import Trainer


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    write_target(tmp_path / "target")
    return offline(tmp_path)


def trainer_of(world: World, settings: Settings) -> Trainer:
    trainer = Trainer(settings, world.target, threading.Event())
    trainer._start()
    return trainer


def train(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        step_batch = trainer._prefetcher.next_batch()
        assert step_batch
        trainer._train_step(step_batch)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer._learner.draft.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_training_that_diverges_is_rolled_back_and_not_registered(settings: Settings) -> None:
    world = World(settings)
    world.serve(40)
    sound = trainer_of(world, settings)
    train(sound, 60)
    sound._evaluate()
    assert sound.status().rollbacks == 0
    good, step = weights(sound), sound.status().step

    poisoned = settings.model_copy(update={"train": settings.train.model_copy(update={"learning_rate": 3.0})})
    trainer = trainer_of(world, poisoned)
    assert same(weights(trainer), good)
    train(trainer, 12)
    trainer._checkpoint()
    error_before = trainer.status().error
    trainer._evaluate()
    status = trainer.status()
    assert (status.step, status.rollbacks, status.steps_skipped) == (step, 1, 0)
    assert "last good checkpoint" in (status.last_rollback or "")
    assert status.error == error_before, "the registry was not called"
    assert same(weights(trainer), good)
    assert b"aurora_train_divergence_rollbacks_total 1.0" in _metrics(trainer)

    restarted = trainer_of(world, settings)
    assert restarted.status().step == step, "checkpoints after the good one are removed"
    assert same(weights(restarted), good)


def test_three_steps_that_are_not_finite_roll_training_back(settings: Settings) -> None:
    world = World(settings)
    world.serve(40)
    trainer = trainer_of(world, settings)
    good = weights(trainer)
    train(trainer, 5)
    with torch.no_grad():
        trainer._learner.draft.fc.weight[0, 0] = torch.nan
    train(trainer, 3)
    status = trainer.status()
    assert (status.step, status.rollbacks, status.steps_skipped) == (0, 1, 3)
    assert same(weights(trainer), good)
    train(trainer, 5)
    assert trainer.status().step == 5


def test_a_broken_batch_is_skipped(settings: Settings) -> None:
    world = World(settings)
    world.serve(20)
    trainer = trainer_of(world, settings)
    train(trainer, 4)
    before = weights(trainer)
    step_batch = trainer._prefetcher.next_batch()
    assert step_batch
    ((batch,),) = step_batch.batches
    trainer._train_step(
        replace(step_batch, batches=((replace(batch, features_BTF=torch.full_like(batch.features_BTF, 3e38)),),))
    )
    assert trainer.status().steps_skipped == 0, "norms bound any finite value"
    trainer._train_step(replace(step_batch, batches=((replace(batch, features_BTF=batch.features_BTF * torch.inf),),)))
    status = trainer.status()
    assert (status.step, status.steps_skipped, status.rollbacks) == (5, 1, 0)
    assert b"aurora_train_steps_skipped_total 1.0" in _metrics(trainer)
    assert not same(weights(trainer), before)
    assert all(parameter.isfinite().all() for parameter in weights(trainer))


def test_a_batch_without_a_teacher_is_no_training_step(settings: Settings) -> None:
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"rejected_weight": 0.0})})
    world = World(settings)
    world.serve(20)
    trainer = trainer_of(world, settings)
    train(trainer, 4)
    step_batch = trainer._prefetcher.next_batch()
    assert step_batch
    ((batch,),) = step_batch.batches
    trainer._train_step(replace(step_batch, batches=((replace(batch, features_BTF=batch.features_BTF * torch.inf),),)))
    before, losses, requests = trainer.status(), list(trainer._losses), dict(trainer._lineage._first_steps)
    trainer._train_step(replace(step_batch, batches=((replace(batch, known_BT=batch.known_BT & False),),)))
    assert str(trainer.status()) == str(before)
    assert (trainer._losses, trainer._lineage._first_steps) == (deque(losses), requests)
    assert b"aurora_train_steps_without_loss_total 1.0" in _metrics(trainer)
    assert b"aurora_train_steps_total 5.0" in _metrics(trainer)
    assert b"aurora_train_steps_skipped_total 1.0" in _metrics(trainer)


def test_changing_traffic_is_not_divergence(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(settings)
    world.serve(60)
    trainer = trainer_of(world, settings)
    train(trainer, 150)
    trainer._evaluate()
    before = trainer.status().acceptance_length
    monkeypatch.setattr("trainer_world.after", lambda token: (token * 11 + 5) % 30)
    world.serve(240)
    train(trainer, 3)
    trainer._evaluate()
    after = trainer.status().acceptance_length
    assert before is not None
    assert after is not None
    assert after - 1 < (before - 1) / 2, "the shift is too small for this test"
    assert trainer.status().rollbacks == 0


def test_without_the_guard_nothing_is_rolled_back(settings: Settings) -> None:
    off = settings.model_copy(
        update={"train": settings.train.model_copy(update={"divergence_threshold": 0.0, "learning_rate": 3.0})}
    )
    world = World(off)
    world.serve(40)
    trainer = trainer_of(world, off)
    train(trainer, 12)
    trainer._evaluate()
    assert trainer.status().rollbacks == 0


def _metrics(trainer: Trainer) -> bytes:
    from prometheus_client import generate_latest

    return generate_latest(trainer.metrics_registry)
