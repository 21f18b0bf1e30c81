"""Checkpoints resume training exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from schemas.settings import Train
from schemas.speculator.network import DraftShape, random_draft
from trainer.data.batch import Batch, collate
from trainer.data.data_loader import DataLoaderState
from trainer.data.samples import Branch, Sample, Teacher
from trainer.loop.checkpoints import Checkpoints, TrainState
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
        open_requests=[("traces", 0, 4, 5)],
        random=(3, (1, 2, 3), None),
    )
    return TrainState(step=step, tokens_seen=70, parent="day-0-head-0", data_loader=loader)


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
    checkpoints.write(state(through.steps), through.state_tensors())
    resumed, found = learner(), checkpoints.read_newest()
    assert found is not None
    resumed.restore(found[1], found[0].step)
    for i in range(before, before + 4):
        assert torch.equal(through.step(batch(i)).total, resumed.step(batch(i)).total)
    assert all(torch.equal(a, b) for a, b in zip(weights(through), weights(resumed), strict=True))
    assert resumed.steps == before + 4


def test_the_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "line", TrainState).write(state(3), learner().state_tensors())
    found = Checkpoints(tmp_path / "line", TrainState).read_newest()
    assert found is not None
    assert found[0] == state(3)


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    for step in (9, 10, 100, 101):
        checkpoints.write(state(step), learner().state_tensors())
    assert sorted(p.name for p in (tmp_path / "line").iterdir()) == ["step-0000000100", "step-0000000101"]
    found = checkpoints.read_newest()
    assert found is not None
    assert found[0].step == 101


def test_a_checkpoint_of_the_same_step_replaces_the_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    checkpoints.write(state(3, cursor=5), learner().state_tensors())
    checkpoints.write(state(3, cursor=8), learner().state_tensors())
    found = checkpoints.read_newest()
    assert found is not None
    assert found[0].data_loader.cursor == 8


@pytest.mark.parametrize("damage", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path: Path, damage: str, how: str) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    checkpoints.write(state(3), learner().state_tensors())
    newest = checkpoints.write(state(4), learner().state_tensors()) / damage
    if how == "cut":
        newest.write_bytes(newest.read_bytes()[:40])
    else:
        newest.unlink()
    found = checkpoints.read_newest()
    assert found is not None
    assert found[0].step == 3


def test_an_unfinished_checkpoint_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    checkpoints.write(state(3), learner().state_tensors())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.write(state(4), learner().state_tensors())
    found = checkpoints.read_newest()
    assert found is not None
    assert found[0].step == 3
    checkpoints.write(state(5), learner().state_tensors())
    assert len(list((tmp_path / "line").iterdir())) == 2


def test_lines_have_separate_checkpoints(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "line", TrainState).write(state(3), learner().state_tensors())
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


def good(step: int) -> TrainState:
    return state(step).model_copy(update={"good": True})


def test_the_last_good_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    for one in (good(1), good(2), state(3), state(4), state(5)):
        checkpoints.write(one, learner().state_tensors())
    assert [p.name[-1] for p in sorted((tmp_path / "line").iterdir())] == ["2", "4", "5"]
    found = checkpoints.read_good()
    assert found is not None
    assert found[0] == good(2)


def test_without_a_good_checkpoint_none_is_returned(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    checkpoints.write(state(3), learner().state_tensors())
    assert checkpoints.read_good() is None


def test_checkpoints_after_a_step_can_be_removed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "line", TrainState)
    for one in (good(3), state(4), state(15)):
        checkpoints.write(one, learner().state_tensors())
    checkpoints.remove_after(3)
    found = checkpoints.read_newest()
    assert found is not None
    assert found[0].step == 3
