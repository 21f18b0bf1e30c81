"""The divergence guard rolls back to the last good checkpoint, and a diverged draft is not registered."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_world import World, offline, write_target

from schemas.settings import Settings
from schemas.speculator.draft_folder import write_draft_folder
from schemas.speculator.layouts import Verifier
from schemas.speculator.network import EagleDraft
from trainer.data.samples import Sample
from trainer.data.target import read_target
from trainer.objective.simulated_acceptance import SampleChains
from trainer.release.evaluation import HeldOutEvaluator
from trainer.release.registry import SpeculatorRegistry
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


def set_champion(draft: EagleDraft, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the registry answer that a draft is champion."""
    monkeypatch.setattr(SpeculatorRegistry, "aliases", lambda *_: {"champion": "1"})
    monkeypatch.setattr("trainer.release.evaluation.read_draft", lambda *_: draft)


def test_training_that_diverges_is_rolled_back_and_not_registered(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(settings)
    world.serve(40)
    sound = trainer_of(world, settings)
    train(sound, 60)
    set_champion(sound._learner.export_draft(), monkeypatch)
    sound._evaluate()
    sound._take_written(wait=True)
    assert sound.status().rollbacks == 0
    good, step = weights(sound), sound.status().step

    poisoned = settings.model_copy(update={"train": settings.train.model_copy(update={"learning_rate": 3.0})})
    trainer = trainer_of(world, poisoned)
    assert same(weights(trainer), good)
    train(trainer, 12)
    trainer._checkpoint()
    trainer._evaluate()
    status = trainer.status()
    assert (status.step, status.rollbacks, status.steps_skipped) == (step, 1, 0)
    assert "of the champion" in (status.last_rollback or "")
    assert (status.registered, status.evaluations_since_registration) == ([], 1)
    assert same(weights(trainer), good)
    assert b"aurora_train_divergence_rollbacks_total 1.0" in _metrics(trainer)

    restarted = trainer_of(world, settings)
    assert restarted.status().step == step, "checkpoints after the good one are removed"
    assert same(weights(restarted), good)


def test_a_slow_slide_below_the_champion_is_rolled_back(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of each draft states its accepted tokens per step; no single fall halves them."""
    world = World(settings)
    world.serve(40)
    champion = world.target.new_draft()
    with torch.no_grad():
        champion.norm.weight[0] = 1.25
    set_champion(champion, monkeypatch)

    def simulate(_: HeldOutEvaluator, draft: EagleDraft, samples: Sequence[Sample]) -> list[SampleChains]:
        accepted = draft.norm.weight[0].item()
        return [SampleChains(np.array([1]), np.zeros((1, 1)), np.array([accepted])) for _ in samples]

    monkeypatch.setattr(HeldOutEvaluator, "_simulate", simulate)
    trainer = trainer_of(world, settings)
    for number, (accepted, rollbacks) in enumerate([(1.25, 0), (0.6875, 0), (0.375, 1), (0.5, 2)], start=1):
        train(trainer, 2)
        state = trainer._learner.draft.state_dict()
        state["norm.weight"][0] = accepted
        trainer._learner.load_weights(state)
        trainer._evaluate()
        assert (trainer.status().rollbacks, trainer.status().step) == (rollbacks, 4 if rollbacks else 2 * number)
        assert f"aurora_train_evaluations_since_registration {number}.0".encode() in _metrics(trainer)
    assert "1.250 of the champion" in (trainer.status().last_rollback or "")
    assert trainer._learner.draft.norm.weight[0].item() == 0.6875


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
    (batch,) = step_batch.batches
    trainer._train_step(
        replace(step_batch, batches=(replace(batch, features_BTF=torch.full_like(batch.features_BTF, 3e38)),))
    )
    assert trainer.status().steps_skipped == 0, "norms bound any finite value"
    trainer._train_step(replace(step_batch, batches=(replace(batch, features_BTF=batch.features_BTF * torch.inf),)))
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
    (batch,) = step_batch.batches
    trainer._train_step(replace(step_batch, batches=(replace(batch, features_BTF=batch.features_BTF * torch.inf),)))
    before, losses, requests = trainer.status(), list(trainer._losses), dict(trainer._lineage._sections[-1].first_steps)
    trainer._train_step(replace(step_batch, batches=(replace(batch, known_BT=batch.known_BT & False),)))
    assert str(trainer.status()) == str(before)
    assert (trainer._losses, trainer._lineage._sections[-1].first_steps) == (deque(losses), requests)
    assert b"aurora_train_steps_without_loss_total 1.0" in _metrics(trainer)
    assert b"aurora_train_steps_total 5.0" in _metrics(trainer)
    assert b"aurora_train_steps_skipped_total 1.0" in _metrics(trainer)


def test_changing_traffic_is_not_divergence(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(settings)
    world.serve(60)
    trainer = trainer_of(world, settings)
    train(trainer, 150)
    set_champion(trainer._learner.export_draft(), monkeypatch)
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


@pytest.mark.parametrize("named", ["", "theirs"])
def test_a_day_0_draft_from_a_folder_is_trained_on_as_a_trained_one(
    settings: Settings, tmp_path: Path, named: str
) -> None:
    folder = str(tmp_path / named) if named else ""
    if named:
        draft = read_target(settings).day_0
        write_draft_folder(draft, tmp_path / named, "vllm", Verifier("target", (), 3))
    update = {"speculator": settings.speculator.model_copy(update={"day_0_folder": folder})}
    world = World(settings.model_copy(update=update))
    trainer = trainer_of(world, world.settings)
    assert trainer._warm_started is bool(named)
    assert trainer._lineage.parent == world.settings.speculator.day_0
