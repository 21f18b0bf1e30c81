"""Several processes train one draft exactly as one process does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from trainer_world import RUN_TRAINER, World, end, offline, process, step_of, until, write_target

from schemas.settings import Train
from trainer.loop.checkpoints import load_tensors

SCRIPT = Path(__file__).parents[1] / "support" / "training_rank.py"
STEPS = 12
SETTINGS = Train(
    dtype="float32",
    optimizer="adamw",
    ttt_steps=3,
    warmup_steps=4,
    learning_rate=1e-2,
    rejected_min_prob=0.0,
    ema_decay=0.9,
)


def run(out: Path, processes: int, *trainings: Train, how: str = "alone") -> None:
    """Run the trainings one after the other on the given number of processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    settings = json.dumps([one.model_dump(mode="json") for one in trainings])
    command = [sys.executable, *torchrun, str(SCRIPT), str(out), str(STEPS), settings, how]
    path = f"{SCRIPT.parents[2]}:{os.environ.get('PYTHONPATH', '')}"
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}
    ended = subprocess.run(command, env=environ, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert {json.loads(curve.read_text())["ranks"] for curve in out.glob("*/curve.json")} == {processes}


def losses(folder: Path) -> list[float]:
    """Return the loss of every step."""
    found: list[float] = json.loads((folder / "curve.json").read_text())["losses"]
    return found


def test_two_processes_have_the_losses_state_and_weights_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    muon = SETTINGS.model_copy(update={"optimizer": "muon", "parallel": "fsdp2"})
    ddp, fsdp2 = SETTINGS, SETTINGS.model_copy(update={"parallel": "fsdp2"})
    shared = [ddp, fsdp2, *(one.model_copy(update={"gradient_accumulation_steps": 2}) for one in (ddp, fsdp2))]
    run(one, 1, muon, SETTINGS)
    run(two, 2, muon, *shared)
    curve, state, draft = (
        losses(one / "1"),
        load_file(one / "1/state.safetensors"),
        load_file(one / "1/draft.safetensors"),
    )
    assert curve[-1] < curve[0] * 0.95
    for number, settings in enumerate(shared, start=1):
        which = f"{settings.parallel}, {settings.gradient_accumulation_steps} parts"
        folder = two / str(number)
        assert losses(folder) == pytest.approx(curve, rel=1e-4), which
        own = load_file(folder / "state.safetensors")
        assert own.keys() == state.keys()
        assert len(list((folder / "end").iterdir())) == 2, "each process writes its part"
        for name, value in load_tensors(folder / "end").items():
            assert torch.equal(value, own[name]), f"{name} on one process, {which}"
        for name, value in load_file(folder / "draft.safetensors").items():
            assert_close(value, draft[name], rtol=1e-3, atol=1e-4, msg=f"{name}, {which}")
    # Muon computes its update in bfloat16, where the last bit of a gradient can change a weight visibly.
    assert losses(two / "0") == pytest.approx(losses(one / "0"), rel=1e-3)


def test_each_process_reads_its_own_share_and_is_sent_the_selection_alone(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    parts = SETTINGS.model_copy(update={"gradient_accumulation_steps": 2})
    run(one, 1, SETTINGS, how="from-rank-0")
    run(two, 2, SETTINGS, parts, how="from-rank-0")
    for number in ("0", "1"):
        found = json.loads((two / number / "curve.json").read_text())
        assert found["losses"] == pytest.approx(losses(one / "0"), rel=1e-4)
        draft = load_file(one / "0/draft.safetensors")
        for name, value in load_file(two / number / "draft.safetensors").items():
            assert_close(value, draft[name], rtol=1e-3, atol=1e-4, msg=name)
        assert all(2 * sent < features for sent, features in zip(found["sent"], found["features"], strict=True))


def test_one_process_resumes_from_the_checkpoint_of_torchrun(tmp_path: Path, free_port: Callable[[], int]) -> None:
    write_target(tmp_path / "target")
    settings = offline(tmp_path, port=free_port(), parallel="fsdp2", ema_decay=0.9, gradient_accumulation_steps=2)
    world = World(settings)
    world.serve(40)
    line = Path(settings.train.checkpoint_dir) / world.target.line
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ops.cli.main", "train")
    with process(settings, torchrun, tmp_path / "torchrun.log") as running:
        until(lambda: step_of(settings) >= 5, "steps")
        assert end(running) in (0, -signal.SIGTERM, 1)
    stopped_at = int(max(line.glob("step-*")).name.removeprefix("step-"))
    assert stopped_at >= 5
    with process(settings, RUN_TRAINER, tmp_path / "one.log") as running:
        until(lambda: step_of(settings) > stopped_at, "steps of one process after those of two")
        assert end(running) == 0
