"""``aurora replay train``: the same numbers in one run, after a kill, and in two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from trainer_world import World, offline, until, write_target
from typer.testing import CliRunner, Result

from ops.cli.main import app
from pipeline import holds
from schemas.settings import Settings, Train, to_environ
from schemas.speculator import checkpoint
from trainer.replay import experiment
from trainer.replay.experiment import TableSpan, read_samples

REQUESTS, COMMITS = 8, 4
AURORA = "from ops.cli.main import app; app()"
RATES = {"fast": 5e-3, "slow": 1e-5}


@pytest.fixture
def world(tmp_path: Path) -> World:
    write_target(tmp_path / "target")
    settings = offline(
        tmp_path, ttt_steps=2, batch_size=4, replay_batch_size=2, checkpoint_interval=1e-6, ema_decay=0.0
    )
    stack = settings.stack.model_copy(update={"data_dir": str(tmp_path / "stack")})
    made = World(settings.model_copy(update={"stack": stack}))
    for _ in range(COMMITS):
        made.serve(REQUESTS)
    for name, rate in RATES.items():
        (tmp_path / f"{name}.toml").write_text(f"[train]\nlearning_rate = {rate}\n")
    return made


def environ(settings: Settings) -> dict[str, str]:
    """Return all settings except the one that the files set."""
    return {name: value for name, value in to_environ(settings).items() if "LEARNING_RATE" not in name}


def arguments(world: World, name: str, *more: str) -> list[str]:
    folder = Path(world.settings.tables.uri).parent
    configs = [text for variant in RATES for text in ("--config", str(folder / f"{variant}.toml"))]
    return ["replay", "train", *configs, "--name", name, "--json", *more]


def train(world: World, name: str, *more: str) -> Result:
    output = CliRunner().invoke(app, arguments(world, name, *more), env=environ(world.settings))
    assert output.exit_code == 0, output.output
    return output


def numbers(world: World, name: str) -> dict[str, Any]:
    """Return the results without durations."""
    folder = Path(world.settings.stack.data_dir) / "replay" / name
    results = {variant: json.loads((folder / variant / "result.json").read_text()) for variant in RATES}
    return {variant: {k: v for k, v in output.items() if not k.endswith("_s")} for variant, output in results.items()}


def test_a_killed_experiment_resumes_with_the_same_numbers(world: World) -> None:
    whole = json.loads(train(world, "whole").stdout)
    folder = Path(world.settings.stack.data_dir) / "replay" / "cut"
    env = {**os.environ, **environ(world.settings), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", AURORA, *arguments(world, "cut")]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        checkpoints = folder / "fast" / "checkpoints"
        until(lambda: list(checkpoints.glob("step-*")) or running.poll() is not None, "a checkpoint")
        running.send_signal(signal.SIGKILL)
    assert not (folder / "fast" / "result.json").exists(), "it was done before it could be killed"
    again = json.loads(train(world, "cut").stdout)
    assert numbers(world, "cut") == numbers(world, "whole")
    for one, other in zip(whole["variants"], again["variants"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert list(folder.glob("*/checkpoint*")) == []
    drafts = [
        checkpoint.read_checkpoint(at / "fast" / "draft", world.target.line) for at in (folder, folder.parent / "whole")
    ]
    assert torch.equal(drafts[0].fc.weight, drafts[1].fc.weight)


def test_completed_variants_are_read_and_two_processes_give_the_same_numbers(world: World, tmp_path: Path) -> None:
    files = "--html", str(tmp_path / "page.html"), "--svg", str(tmp_path / "plot.svg")
    output = train(world, "two", "--processes", "2", *files)
    found = json.loads(output.stdout)
    assert "no runs in MLflow: registry.tracking_uri" in output.stderr
    fast, slow = found["variants"]
    assert (fast["name"], fast["samples"], fast["steps"]) == ("fast", REQUESTS * COMMITS, REQUESTS * COMMITS // 2)
    assert fast["accepted_per_step_at_end"] > slow["accepted_per_step_at_end"]
    assert fast["difference"] is None
    assert slow["difference"]["high"] < 0
    assert "fast" in (tmp_path / "page.html").read_text()
    assert ET.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
    train(world, "one")
    assert numbers(world, "two") == numbers(world, "one")
    before = json.loads(output.stdout)
    assert json.loads(train(world, "two").stdout) == before, "not run again: even the seconds are the same"


def test_an_experiment_holds_its_span_and_its_name_identifies_it(world: World) -> None:
    train(world, "part", "--from", "version:1", "--to", "version:3")
    held = {one.table: (one.after_version, one.up_to_version) for one in holds.list_holds(world.tables)}
    assert held["accepted"] == (1, 3)
    assert numbers(world, "part")["fast"]["counts"]["rows"] == 2 * REQUESTS
    world.serve(REQUESTS)
    assert train(world, "part").stdout
    output = CliRunner().invoke(app, arguments(world, "part", "--to", "version:4"), env=environ(world.settings))
    assert output.exit_code == 2
    assert "choose another --name" in output.output


def test_a_span_yields_the_samples_of_its_commits_with_their_branches(world: World) -> None:
    target, counts = world.target, Counter[str]()
    span = TableSpan(accepted=(1, 3), rejected=(0, COMMITS), target=target.fingerprint, line=target.line)
    asked = list(read_samples(world.tables, span, Train(), lambda tokens: torch.zeros(len(tokens), 48), counts))
    assert [one.request for one in asked] == [f"request-{i}" for i in range(REQUESTS, 3 * REQUESTS)]
    assert all(one.branches for one in asked)
    assert {one.label for one in asked} == {None}


def test_variant_files_share_tables_and_have_distinct_names(world: World, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "fast.toml"
    twin.write_text("")
    for more, why in (
        (["--config", str(twin)], "another variant is also named fast"),
        (["--from", "version:x"], "is not a version: write version:120"),
        (["--from", "version:4", "--to", "version:4"], "no span of table accepted"),
    ):
        output = CliRunner().invoke(app, arguments(world, "wrong", *more), env=environ(world.settings))
        assert output.exit_code == 2
        assert why in output.output


def test_the_settings_digest_depends_on_training_and_not_on_checkpoint_intervals(world: World) -> None:
    train_settings = world.settings.train
    saved, other = (
        world.settings.model_copy(update={"train": train_settings.model_copy(update=update)})
        for update in ({"checkpoint_interval": 7.0}, {"ema_decay": 0.5})
    )
    assert (
        experiment.digest_settings(saved)
        == experiment.digest_settings(world.settings)
        != experiment.digest_settings(other)
    )
