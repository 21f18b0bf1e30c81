"""The trainer's curves in a real MLflow, and the weights with which a training starts."""

from __future__ import annotations

import threading
from itertools import count
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from trainer_world import World, offline, write_target

from schemas.registry_client import model_name
from schemas.settings import Settings, SettingsError
from schemas.speculator import checkpoint
from trainer.train import Trainer


def settings_of(folder: Path, registry: str, **train: object) -> Settings:
    settings = offline(folder, **train)
    return settings.model_copy(
        update={"registry": settings.registry.model_copy(update={"tracking_uri": registry, "timeout": 10})}
    )


@pytest.fixture
def world(registry: str, tmp_path: Path) -> World:
    write_target(tmp_path / "target")
    return World(settings_of(tmp_path, registry, metrics_interval=0.2, registration_interval=0.5))


def test_a_trainer_writes_its_curves_to_one_run(world: World, registry: str) -> None:
    world.serve(40)
    stopping = threading.Event()
    trainer = Trainer(world.settings, world.target, stopping)
    evaluate = trainer._evaluate

    def evaluate_once_running() -> None:
        # A version that is registered before the run exists names no run.
        if trainer.status().mlflow_run:
            evaluate()
        if trainer.status().registered:
            stopping.set()

    trainer._evaluate = evaluate_once_running  # type: ignore[method-assign]
    trainer.run()
    status = trainer.status()
    client = MlflowClient(registry)
    assert status.mlflow_run
    run = client.get_run(status.mlflow_run)
    assert run.info.status == "FINISHED"
    assert run.info.experiment_id == client.get_experiment_by_name(model_name(world.target.line)).experiment_id
    assert run.data.params["learning_rate"] == "0.005"
    assert run.data.tags["line"] == world.target.line
    steps = {f"ttt_step_loss_{k}" for k in range(world.settings.train.ttt_steps)}
    data_loader = {"lag_commits", "newest_sample_age_seconds", "tokens_per_second"}
    assert run.data.metrics.keys() >= {"loss", "loss_accepted", "loss_rejected", "acceptance_length", "held_out_loss"}
    assert run.data.metrics.keys() >= {"gradient_norm", "learning_rate"} | steps | data_loader
    losses = client.get_metric_history(status.mlflow_run, "loss")
    assert [point.step for point in losses] == sorted(point.step for point in losses)
    assert losses[-1].step == status.step
    assert world.registry.tags(world.target.line, status.registered[0])["curves"] == status.mlflow_run


def test_a_training_starts_with_the_weights_that_warm_start_names(world: World, tmp_path: Path, registry: str) -> None:
    line, drafts = world.target.line, {}
    for number, scale in (("1", 1.5), ("2", 2.5)):
        draft = world.target.new_draft()
        with torch.no_grad():
            draft.norm.weight.fill_(scale)
        checkpoint.write_checkpoint(draft, tmp_path / number, world.target.fingerprint)
        drafts[number] = world.registry.register(line, tmp_path / number, {}, {})
    world.registry.set_alias(line, "champion", drafts["2"])

    begins = count()

    def begun(start: str) -> tuple[str, float, float]:
        rates = {"learning_rate": 4e-3, "warm_start_learning_rate": 1e-3, "warmup_steps": 0}
        settings = settings_of(
            tmp_path, registry, warm_start=start, checkpoint_dir=str(tmp_path / f"train-{next(begins)}"), **rates
        )
        trainer = Trainer(settings, world.target, threading.Event())
        trainer._start()
        restarted = Trainer(settings, world.target, threading.Event())
        restarted._start()
        assert restarted._learner.learning_rate == trainer._learner.learning_rate
        return (
            trainer._lineage.parent,
            float(trainer._learner.draft.norm.weight.detach()[0]),
            trainer._learner.learning_rate,
        )

    assert begun("alias") == (drafts["2"], 2.5, 1e-3)
    assert begun("day-0") == ("day-0-head-0", 1.0, 4e-3)
    assert begun(drafts["1"]) == (drafts["1"], 1.5, 1e-3)
    folder = str(tmp_path / "1")
    assert begun(folder) == (folder, 1.5, 1e-3)
    with pytest.raises(SettingsError, match=r"train\.warm_start.*nowhere"):
        begun(str(tmp_path / "nowhere"))
