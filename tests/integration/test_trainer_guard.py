"""Training that goes wrong registers nothing, and goes back to its last good state."""

from __future__ import annotations

import threading
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


def learn(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        work = trainer._loader.next_batch()
        assert work
        trainer._train_step(work)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer._learner.draft.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_poisoned_learning_rate_is_undone_and_what_it_made_is_not_offered(settings: Settings) -> None:
    world = World(settings)
    world.serve(40)
    sound = trainer_of(world, settings)
    learn(sound, 60)
    sound._evaluate()
    assert sound.status().rollbacks == 0
    good, step = weights(sound), sound.status().step

    poisoned = settings.model_copy(update={"train": settings.train.model_copy(update={"learning_rate": 3.0})})
    trainer = trainer_of(world, poisoned)
    assert same(weights(trainer), good)
    learn(trainer, 12)
    trainer._checkpoint()
    asked_before = trainer.status().error
    trainer._evaluate()
    status = trainer.status()
    assert (status.step, status.rollbacks, status.steps_skipped) == (step, 1, 0)
    assert "last good checkpoint" in (status.last_rollback or "")
    assert status.error == asked_before, "the registry was not asked"
    assert same(weights(trainer), good)
    assert b"aurora_train_divergence_rollbacks_total 1.0" in _metrics(trainer)

    restarted = trainer_of(world, settings)
    assert restarted.status().step == step, "checkpoints of what went wrong are gone"
    assert same(weights(restarted), good)


def test_weights_that_are_no_numbers_any_more_are_given_up_after_three_steps(settings: Settings) -> None:
    world = World(settings)
    world.serve(40)
    trainer = trainer_of(world, settings)
    good = weights(trainer)
    learn(trainer, 5)
    with torch.no_grad():
        trainer._learner.draft.fc.weight[0, 0] = torch.nan
    learn(trainer, 3)
    status = trainer.status()
    assert (status.step, status.rollbacks, status.steps_skipped) == (0, 1, 3)
    assert same(weights(trainer), good)
    learn(trainer, 5)
    assert trainer.status().step == 5


def test_a_broken_batch_is_passed_over(settings: Settings) -> None:
    world = World(settings)
    world.serve(20)
    trainer = trainer_of(world, settings)
    learn(trainer, 4)
    before = weights(trainer)
    work = trainer._loader.next_batch()
    assert work
    ((batch,),) = work.batches
    trainer._train_step(
        replace(work, batches=((replace(batch, features_BTF=torch.full_like(batch.features_BTF, 3e38)),),))
    )
    assert trainer.status().steps_skipped == 0, "norms bear whatever is finite"
    trainer._train_step(replace(work, batches=((replace(batch, features_BTF=batch.features_BTF * torch.inf),),)))
    status = trainer.status()
    assert (status.step, status.steps_skipped, status.rollbacks) == (5, 1, 0)
    assert b"aurora_train_steps_skipped_total 1.0" in _metrics(trainer)
    assert not same(weights(trainer), before)
    assert all(parameter.isfinite().all() for parameter in weights(trainer))


def test_traffic_that_changes_is_no_reason_to_go_back(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(settings)
    world.serve(60)
    trainer = trainer_of(world, settings)
    learn(trainer, 150)
    trainer._evaluate()
    before = trainer.status().acceptance_length
    monkeypatch.setattr("trainer_world.after", lambda token: (token * 11 + 5) % 30)
    world.serve(240)
    learn(trainer, 3)
    trainer._evaluate()
    after = trainer.status().acceptance_length
    assert before is not None
    assert after is not None
    assert after - 1 < (before - 1) / 2, "the shift is not deep enough to say something"
    assert trainer.status().rollbacks == 0


def test_without_a_guard_nothing_goes_back(settings: Settings) -> None:
    off = settings.model_copy(
        update={"train": settings.train.model_copy(update={"divergence_threshold": 0.0, "learning_rate": 3.0})}
    )
    world = World(off)
    world.serve(40)
    trainer = trainer_of(world, off)
    learn(trainer, 12)
    trainer._evaluate()
    assert trainer.status().rollbacks == 0


def _metrics(trainer: Trainer) -> bytes:
    from prometheus_client import generate_latest

    return generate_latest(trainer.metrics_registry)
