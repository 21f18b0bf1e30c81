"""Checkpoints resume training exactly."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from schemas.settings import Train
from schemas.speculator.network import DraftShape, random_draft
from trainer.data.batch import Batch, collate
from trainer.data.data_loader import DataLoaderState
from trainer.data.samples import Branch, Sample, Teacher
from trainer.loop.checkpoints import Checkpoints, TrainState, load_tensors, save_tensors
from trainer.loop.learner import Learner

SHAPE = DraftShape(8, 8, 2, 1, 4, 32, 16, 1e-6, 100.0, 64, (1, 2, 3))
SETTINGS = Train(dtype="float32", ttt_steps=3, warmup_steps=4, learning_rate=1e-2)
EMBEDDINGS = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).half()


def learner() -> Learner:
    return Learner(random_draft(SHAPE, 0), EMBEDDINGS, SETTINGS)


def batch(seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)

    def teacher(n: int) -> Teacher:
        return Teacher(torch.randint(0, 16, (n, 1), generator=g), torch.zeros(n, 1))

    tokens = torch.randint(0, 32, (7,), generator=g)
    features = torch.randn(7, SHAPE.feature_width, generator=g).bfloat16()
    known = torch.arange(7) > 2
    return collate(
        [Sample("r", tokens, 3, features, known, teacher(4), (Branch(4, (1, 2), 0, (-0.5, -0.5), teacher(2)),))]
    )


def state(step: int, cursor: int = 5) -> TrainState:
    loader = DataLoaderState(
        cursor=cursor,
        rejected_cursor=6,
        reread_after=1,
        reread_rejected_after=2,
        reached=[("traces", 0, 7)],
        waiting=[("traces", 0, 7, 7, 0)],
        replay_buffer=[(("traces", 0, 6, 6, 0), 2)],
        held_out=[],
        left_held_out=[],
        recent_labels=[],
        open_requests=[("traces", 0, 4, 5)],
        random=(3, (1, 2, 3), None),
    )
    return TrainState(step=step, tokens_seen=70, parent="day-0-head-0", data_loader=loader)


def write(
    checkpoints: Checkpoints[TrainState], state: TrainState, tensors: dict[str, torch.Tensor] | None = None
) -> TrainState:
    """Write a checkpoint to its end, of an untrained learner by default."""
    checkpoints.write(state, partial(save_tensors, tensors or learner().state_tensors()))
    written = checkpoints.take_written()
    assert written is not None
    return written


def weights(a: Learner) -> list[torch.Tensor]:
    return [p.detach().clone() for p in a.draft.parameters()]


def test_training_without_its_optimizer_state_differs() -> None:
    through, bare = learner(), learner()
    through.step(batch(0))
    bare.draft.load_state_dict(through.draft.state_dict())
    bare.steps = 1
    for one in (through, bare):
        one.step(batch(1))
    assert not all(torch.equal(a, b) for a, b in zip(weights(through), weights(bare), strict=True))


@pytest.mark.parametrize("before", [0, 1, 5])
def test_training_resumed_from_a_checkpoint_is_bitwise_identical(tmp_path: Path, before: int) -> None:
    through, checkpoints = learner(), Checkpoints(tmp_path / "line", TrainState)
    for i in range(before):
        through.step(batch(i))
    write(checkpoints, state(through.steps), through.state_tensors())
    resumed, found = learner(), checkpoints.read_newest()
    assert found is not None
    resumed.load(found[1], found[0].step)
    for i in range(before, before + 4):
        assert torch.equal(through.step(batch(i)).total, resumed.step(batch(i)).total)
    assert all(torch.equal(a, b) for a, b in zip(weights(through), weights(resumed), strict=True))
    assert resumed.steps == before + 4


def test_the_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(Checkpoints(tmp_path / "line", TrainState), state(3))
    found = Checkpoints(tmp_path / "line", TrainState).read_newest()
    assert found is not None
    assert found[0].model_copy(update={"files": {}}) == state(3)


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    for step in (9, 10, 100, 101):
        write(checkpoints, state(step))
    assert sorted(p.name for p in (tmp_path / "line").iterdir()) == ["step-0000000100", "step-0000000101"]
    found = checkpoints.read_newest()
    assert found is not None
    assert found[0].step == 101


def test_a_checkpoint_of_the_same_step_replaces_the_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    write(checkpoints, state(3, cursor=5))
    write(checkpoints, state(3, cursor=8))
    found = checkpoints.read_newest()
    assert found is not None
    assert found[0].data_loader.cursor == 8


@pytest.mark.parametrize("damage", ["state.json", "*.safetensors"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path: Path, damage: str, how: str) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    write(checkpoints, state(3))
    write(checkpoints, state(4))
    (newest,) = (tmp_path / "line" / "step-0000000004").glob(damage)
    if how == "cut":
        newest.write_bytes(newest.read_bytes()[:40])
    else:
        newest.unlink()
    found = checkpoints.read_newest()
    assert found is not None
    assert found[0].step == 3


def test_a_checkpoint_holds_the_state_at_the_call_whatever_training_does_meanwhile(tmp_path: Path) -> None:
    trained, checkpoints = learner(), Checkpoints(tmp_path / "line", TrainState)
    trained.step(batch(0))
    expected = {name: tensor.clone() for name, tensor in trained.state_tensors().items()}
    may_write = threading.Event()

    def save(folder: Path) -> Future[None]:
        saving = trained.save(folder)
        return checkpoints._thread.submit(lambda: (may_write.wait(30), saving.result())[1])

    checkpoints._thread = ThreadPoolExecutor(2)
    checkpoints.write(state(1), save)
    for seed in range(1, 4):
        trained.step(batch(seed))
    assert checkpoints.writing is not None
    assert not checkpoints.writing.done()
    assert checkpoints.read_newest() is None
    may_write.set()
    checkpoints.take_written()
    found = checkpoints.read_newest()
    assert found is not None
    loaded = load_tensors(found[1])
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    assert not torch.equal(loaded["draft/fc.weight"], trained.draft.fc.weight)


def test_a_failed_write_is_an_error_of_the_file_system_and_leaves_the_others(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    write(checkpoints, state(3))

    def save(folder: Path) -> Future[None]:
        folder.rmdir()
        folder.write_text("no folder")
        return learner().save(folder)

    checkpoints.write(state(4), save)
    with pytest.raises(OSError, match=r"train\.checkpoint_dir.*unfinished"):
        checkpoints.take_written()
    found = checkpoints.read_newest()
    assert found is not None
    assert found[0].step == 3
    (tmp_path / "line" / ".unfinished").unlink()
    write(checkpoints, state(5))


class Killed(BaseException):
    """The process ends here."""


def test_a_kill_between_any_two_changes_of_files_leaves_a_newest_and_a_good_checkpoint(tmp_path: Path) -> None:
    calls, tensors = 0, learner().state_tensors()

    def write_until_killed(folder: Path, kill_at: int) -> bool:
        """Write good and other checkpoints; return whether the process was killed before the end."""
        nonlocal calls
        calls, checkpoints = 0, Checkpoints(folder, TrainState)

        def dying(change: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                if count() >= kill_at:
                    raise Killed
                return change(*arguments, **options)

            return call

        with pytest.MonkeyPatch.context() as patch, suppress(Killed, OSError):
            for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            for step in (1, 2, 3, 4):
                checkpoints.write(state(step), partial(save_tensors, tensors), good=step != 3)
                checkpoints.take_written()
            return False
        return True

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    assert not write_until_killed(tmp_path / "whole", 10**6)
    total = calls
    first = Checkpoints(tmp_path / "first", TrainState)
    first.write(state(0), partial(save_tensors, tensors), good=True)
    first.take_written()
    for kill_at in range(1, total + 1):
        folder = tmp_path / str(kill_at)
        shutil.copytree(tmp_path / "first", folder)
        assert write_until_killed(folder, kill_at)
        restarted = Checkpoints(folder, TrainState)
        for found in (restarted.read_newest(), restarted.read_good()):
            assert found is not None, kill_at
            assert load_tensors(found[1]).keys() == tensors.keys()
        restarted.write(state(9), partial(save_tensors, tensors))
        assert restarted.take_written() is not None


def test_lines_have_separate_checkpoints(tmp_path: Path) -> None:
    write(Checkpoints(tmp_path / "line", TrainState), state(3))
    assert Checkpoints(tmp_path / "other", TrainState).read_newest() is None


def test_the_learning_rate_is_constant_after_a_linear_warmup() -> None:
    one, rates = learner(), []
    for i in range(6):
        rates.append(one.learning_rate)
        one.step(batch(i))
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_a_batch_without_a_teacher_changes_nothing() -> None:
    one = learner()
    one.step(batch(0))
    before = weights(one)
    silent = Sample(
        "r",
        torch.arange(4),
        None,
        torch.ones(4, SHAPE.feature_width).bfloat16(),
        torch.tensor([False, False, False, True]),
        Teacher(torch.tensor([[31]]), torch.zeros(1, 1)),
    )
    one.step(collate([silent]))
    assert one.steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, weights(one), strict=True))


def test_the_good_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    for step in (1, 2, 3, 4, 5):
        write(checkpoints, state(step))
        if step <= 2:
            checkpoints.mark_good(step)
    assert [p.name[-1] for p in sorted((tmp_path / "line").glob("step-*"))] == ["2", "4", "5"]
    found = checkpoints.read_good()
    assert found is not None
    assert found[0].step == 2


def test_a_checkpoint_becomes_the_good_one_without_a_copy(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    write(checkpoints, state(3))
    before = {file: file.stat() for file in (tmp_path / "line").rglob("*.safetensors")}
    checkpoints.mark_good(3)
    assert {file: file.stat() for file in (tmp_path / "line").rglob("*.safetensors")} == before
    found = checkpoints.read_good()
    assert found is not None
    assert found[0].step == 3


@pytest.mark.parametrize("content", [None, "", "seven", "99"])
def test_without_a_good_checkpoint_none_is_returned(tmp_path: Path, content: str | None) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    write(checkpoints, state(3))
    if content is not None:
        (tmp_path / "line" / "good.json").write_text(content)
    assert checkpoints.read_good() is None
    write(checkpoints, state(4))


def test_the_state_of_a_checkpoint_can_be_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    written = write(checkpoints, state(3))
    checkpoints.update(written.model_copy(update={"parent": "7"}))
    checkpoints.update(written.model_copy(update={"step": 2}))
    found = checkpoints.read_newest()
    assert found is not None
    assert (found[0].step, found[0].parent) == (3, "7")


def test_checkpoints_after_a_step_can_be_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    for step in (3, 4, 15):
        write(checkpoints, state(step))
        if step == 3:
            checkpoints.mark_good(3)
    checkpoints.remove_after(3)
    found = checkpoints.read_newest()
    assert found is not None
    assert found[0].step == 3
