"""Training and evaluation on a GPU equal those on a CPU.

The engine's own tests run on a GPU if torch finds one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from schemas.device import select_device
from schemas.errors import UserError
from schemas.settings import Train
from schemas.speculator.network import DraftShape, random_draft
from trainer.data.batch import collate
from trainer.data.samples import Branch, Sample, Teacher
from trainer.loop.checkpoints import save_tensors
from trainer.loop.learner import Learner, load_draft
from trainer.objective.simulated_acceptance import simulate_acceptance

SHAPE = DraftShape(8, 8, 2, 1, 4, 32, 16, 1e-6, 100.0, 64, (1, 2, 3), "eagle3.1")
EMBEDDINGS = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
TRAIN = Train(
    dtype="float32",
    ttt_steps=3,
    warmup_steps=0,
    rejected_weight=0.5,
    rejected_min_prob=0.0,
    policy_weight=0.1,
    ema_decay=0.9,
)

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine")


def sample(seed: int) -> Sample:
    g = torch.Generator().manual_seed(seed)
    length = 7 + seed

    def teacher(n: int) -> Teacher:
        return Teacher(torch.randint(0, 16, (n, 2), generator=g), torch.log(torch.rand(n, 2, generator=g) * 0.5))

    return Sample(
        request=f"r{seed}",
        tokens=torch.randint(0, 32, (length,), generator=g),
        next_token=3,
        features=torch.randn(length, SHAPE.feature_width, generator=g).bfloat16(),
        known=torch.arange(length) >= 2,
        teacher=teacher(length - 2),
        branches=(Branch(4, (1, 2), 0, (-0.5, -0.5), teacher(2)),),
    )


SAMPLES = [sample(seed) for seed in range(4)]


def learner(device: str, **changed: object) -> Learner:
    return Learner(random_draft(SHAPE, 0), EMBEDDINGS.to(device), TRAIN.model_copy(update=changed))


def losses(one: Learner, steps: int) -> list[float]:
    return [float(one.step(collate(SAMPLES[:2]), collate(SAMPLES[2:])).total) for _ in range(steps)]


def test_a_cuda_setting_without_a_gpu_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto", "train.device") == torch.device("cpu")
    with pytest.raises(UserError, match=r"train\.device = 'cuda'.*use 'cpu'"):
        select_device("cuda", "train.device")


def test_a_batch_moves_with_all_its_tensors() -> None:
    batch = collate(SAMPLES)
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert moved.features_BTF.is_meta
    assert moved.teacher_BT.ids.is_meta
    assert moved.drafted.teacher_D.logprobs.is_meta
    assert moved.choices.gain_P.is_meta


@on_gpu
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_steps_on_a_gpu_give_the_same_losses_and_weights(optimizer: str) -> None:
    here, there = learner("cpu", optimizer=optimizer), learner("cuda", optimizer=optimizer)
    assert losses(there, 5) == pytest.approx(losses(here, 5), rel=1e-3)
    for (name, own), other in zip(here.draft.named_parameters(), there.draft.parameters(), strict=True):
        torch.testing.assert_close(other.cpu(), own, rtol=1e-2, atol=1e-3, msg=name)


@on_gpu
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_resumes_exactly_from_a_state_saved_on_a_gpu(optimizer: str, tmp_path: Path) -> None:
    one, other = learner("cuda", optimizer=optimizer), learner("cuda", optimizer=optimizer)
    losses(one, 3)
    saving, steps = one.save(tmp_path), one.steps
    expected = losses(one, 3)
    saving.result()
    other.load(tmp_path, steps)
    assert losses(other, 3) == pytest.approx(expected, rel=1e-5)


@on_gpu
def test_simulated_acceptance_on_a_gpu_equals_that_on_a_cpu(tmp_path: Path) -> None:
    draft = random_draft(SHAPE, 1)
    longer = [replace(w, request=f"again-{w.request}") for w in SAMPLES * 5]
    here = simulate_acceptance(draft, EMBEDDINGS, longer, 3)
    assert simulate_acceptance(draft, EMBEDDINGS.cuda(), longer, 3) == here
    state = {f"draft/{name}": value for name, value in draft.state_dict().items()}
    save_tensors(state, tmp_path).result()
    assert simulate_acceptance(load_draft(tmp_path, SHAPE), EMBEDDINGS.cuda(), longer, 3) == here
