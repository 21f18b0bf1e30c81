"""Training goes on while a version is registered, and the registered weights are those that were evaluated."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from trainer_world import World, offline, until, write_target

from schemas.speculator.network import EagleDraft
from trainer.release.evaluation import Evaluation
from trainer.release.registration import Registrar
from trainer.train import Trainer

BLOCKED_S = 20.0


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_registered_weights_are_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema_decay: float
) -> None:
    write_target(tmp_path / "target")
    settings = offline(tmp_path, ema_decay=ema_decay)
    world = World(settings)
    world.serve(40)
    trainer = Trainer(settings, world.target, threading.Event())
    trainer._start()
    upload, written = threading.Event(), list[torch.Tensor]()

    def train(steps: int) -> None:
        for _ in range(steps):
            batch = trainer._prefetcher.next_batch()
            assert batch
            trainer._train_step(batch)

    def register(
        _: Registrar, draft: EagleDraft, evaluation: Evaluation, tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> str:
        assert upload.wait(BLOCKED_S), "training waits for the registration"
        assert evaluation.score.accepted_per_step >= 0
        assert (tags["parent"], metrics["step"]) == ("day-0-head-0", 10.0)
        written.extend(parameter.detach().clone() for parameter in draft.parameters())
        return "1"

    def registered() -> tuple[str, ...]:
        trainer._registrations.poll()
        return trainer._registrations.registered

    monkeypatch.setattr(Registrar, "register_if_better", register)
    train(10)
    evaluated = [parameter.detach().clone() for parameter in trainer._learner.export_draft().parameters()]
    trainer._evaluate()
    trainer._registrations.poll()
    train(10)
    assert trainer.status().step == 20
    assert trainer.status().registered == []
    later = list(trainer._learner.export_draft().parameters())
    upload.set()
    until(registered, "the version", timeout_s=BLOCKED_S)
    assert all(torch.equal(a, b) for a, b in zip(written, evaluated, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(written, later, strict=True))
    assert trainer._lineage.parent == "1"
