"""Replay experiment in a real MLflow: a parent run, a child run for each variant, and curves, logged once."""

from __future__ import annotations

import json
from pathlib import Path

from mlflow.tracking import MlflowClient
from trainer_world import World, offline, write_target
from typer.testing import CliRunner

from ops.cli.main import app
from schemas.registry_client import model_name
from schemas.settings import to_environ
from schemas.speculator import checkpoint
from trainer.release.registry import SpeculatorRegistry


def test_an_experiment_is_a_parent_run_with_a_child_run_for_each_variant(registry: str, tmp_path: Path) -> None:
    write_target(tmp_path / "target")
    settings = offline(tmp_path, ttt_steps=2, batch_size=4, replay_batch_size=2)
    settings = settings.model_copy(
        update={
            "registry": settings.registry.model_copy(update={"tracking_uri": registry, "timeout": 10}),
            "stack": settings.stack.model_copy(update={"data_dir": str(tmp_path / "stack")}),
        }
    )
    world = World(settings)
    world.serve(8)
    flags = []
    for name, rate in (("fast", 5e-3), ("slow", 1e-5)):
        (tmp_path / f"{name}.toml").write_text(f"[train]\nlearning_rate = {rate}\n")
        flags += ["--config", str(tmp_path / f"{name}.toml")]
    environ = {name: value for name, value in to_environ(settings).items() if "LEARNING_RATE" not in name}
    for _ in range(2):
        result = CliRunner().invoke(app, ["replay", "train", *flags, "--name", "rates", "--json"], env=environ)
        assert result.exit_code == 0, result.output

    client = MlflowClient(registry)
    experiment = client.get_experiment_by_name(model_name(world.target.line))
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["fast", "rates", "slow"], "a second call adds none"
    parent = runs["rates"].info.run_id
    assert [runs[name].data.tags["mlflow.parentRunId"] for name in ("fast", "slow")] == [parent] * 2
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["slow"].data.params["learning_rate"] == "1e-05"
    found = {one["name"]: one for one in json.loads(result.stdout)["variants"]}
    for name in ("fast", "slow"):
        run = runs[name].info.run_id
        assert len(client.get_metric_history(run, "loss")) == found[name]["steps"]
        lengths = client.get_metric_history(run, "accepted_per_step")
        assert max(point.step for point in lengths) == found[name]["tokens"]

    # Versions are scored by number and alias as they are registered.
    checkpoint.write_checkpoint(world.target.day_0, tmp_path / "version", world.target.fingerprint)
    mlflow = SpeculatorRegistry(settings.registry)
    version = mlflow.register(world.target.line, tmp_path / "version", {}, {})
    mlflow.set_alias(world.target.line, "champion", version)
    result = CliRunner().invoke(
        app, ["replay", "evaluate", "--versions", f"{version},champion,day-0", "--json"], env=environ
    )
    scored = json.loads(result.stdout)
    assert [one["version"] for one in scored["versions"]] == [version, version, "day-0-head-0"]
    one, other, _ = (of["acceptance_length"] for of in scored["groups"]["all"]["versions"])
    assert one == other
    result = CliRunner().invoke(app, ["replay", "evaluate", "--versions", "canary"], env=environ)
    assert (result.exit_code, "no alias of line" in result.output) == (2, True)
