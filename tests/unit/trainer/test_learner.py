"""The training step: optimizers, moving average, gradient accumulation and skipped steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from schemas.settings import Train
from schemas.speculator.network import DraftShape, EagleDraft, random_draft
from trainer.data.batch import Batch, collate
from trainer.data.samples import Branch, Sample, Teacher
from trainer.loop.learner import Learner, load_draft

SHAPE = DraftShape(8, 8, 2, 1, 4, 32, 16, 1e-6, 100.0, 64, (1, 2, 3))
EMBEDDINGS = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
WARM = Train(dtype="float32", ttt_steps=3, warmup_steps=0, learning_rate=1e-2)


def sample(seed: int, length: int = 9, known_from: int = 2) -> Sample:
    g = torch.Generator().manual_seed(seed)

    def teacher(n: int) -> Teacher:
        return Teacher(torch.randint(0, 16, (n, 2), generator=g), torch.log(torch.rand(n, 2, generator=g) * 0.5))

    branches = (Branch(4, (1, 2), 0, (-0.5, -0.5), teacher(2)),) if seed % 2 else ()
    return Sample(
        request=f"r{seed}",
        tokens=torch.randint(0, 32, (length,), generator=g),
        next_token=3,
        features=torch.randn(length, SHAPE.feature_width, generator=g).bfloat16(),
        known=torch.arange(length) >= known_from,
        teacher=teacher(length - known_from),
        branches=branches,
    )


def batch(*seeds: int) -> Batch:
    return collate([sample(seed, length=7 + seed % 5) for seed in seeds])


def learner(**changed: object) -> Learner:
    return Learner(random_draft(SHAPE, 0), EMBEDDINGS, WARM.model_copy(update=changed))


def weights(draft: EagleDraft) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in draft.named_parameters()}


def gradients(one: Learner) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in one.draft.named_parameters() if p.grad is not None}


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-4, atol=tolerance, msg=name)


@pytest.mark.parametrize("terms", [{}, {"rejected_weight": 0.7, "rejected_min_prob": 0.0}, {"rejection_weight": 2.0}])
def test_gradient_accumulation_has_the_loss_and_the_gradient_of_one_batch(terms: dict[str, float]) -> None:
    whole, parts = learner(max_grad_norm=1e9, **terms), learner(max_grad_norm=1e9, **terms)
    one = whole.step(batch(0, 1, 2, 3, 4, 5))
    other = parts.step(batch(0), batch(1, 2, 3), batch(4, 5))
    assert float(other.total) == pytest.approx(float(one.total), rel=1e-5)
    assert other.accepted_K == pytest.approx(one.accepted_K, rel=1e-5)
    assert (other.rejected, other.positions, other.nodes) == pytest.approx((one.rejected, one.positions, one.nodes))
    assert_close(gradients(parts), gradients(whole))
    assert parts.steps == whole.steps == 1


def test_a_batch_without_a_teacher_does_not_change_the_others() -> None:
    silent = collate([sample(2, length=6, known_from=6)])
    alone, beside = learner(), learner()
    assert float(beside.step(batch(0, 1), silent).total) == pytest.approx(float(alone.step(batch(0, 1)).total))
    assert_close(gradients(beside), gradients(alone))


def test_the_moving_average_equals_that_of_a_plain_loop() -> None:
    one, expected = learner(ema_decay=0.4), weights(random_draft(SHAPE, 0))
    for step in range(1, 12):
        one.step(batch(step))
        decay = min(0.4, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in weights(one.draft).items()}
    assert_close(weights(one.export_draft()), expected)
    assert not torch.equal(one.export_draft().fc.weight, one.draft.fc.weight)
    assert torch.equal(one.export_draft().t2d, one.draft.t2d)


def test_without_an_average_the_draft_in_training_is_exported() -> None:
    one = learner(ema_decay=0.0)
    assert one.export_draft() is one.draft


def newton_schulz(momentum: torch.Tensor, steps: int) -> torch.Tensor:
    """Run the quintic iteration towards the nearest orthogonal matrix, in bfloat16 as torch does."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = momentum.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).float()


@pytest.mark.parametrize("steps", [3, 5])
def test_muon_updates_the_hidden_matrices_as_a_plain_loop_does(steps: int) -> None:
    one = learner(
        optimizer="muon", max_grad_norm=1e9, weight_decay=0.1, muon_learning_rate=2e-2, newton_schulz_steps=steps
    )
    expected = weights(one.draft)
    momentum = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(3):
        one.step(batch(step))
        for name, gradient in gradients(one).items():
            if gradient.ndim < 2 or name == "lm_head.weight":
                continue
            momentum[name] = 0.95 * momentum[name] + 0.05 * gradient
            update = newton_schulz(0.05 * gradient + 0.95 * momentum[name], steps)
            rate = 2e-2 * 0.2 * max(gradient.shape) ** 0.5
            expected[name] = expected[name] * (1 - 2e-2 * 0.1) - rate * update
    moved = [name for name in expected if name == "fc.weight" or name.endswith("_proj.weight")]
    assert len(moved) == 8
    found = weights(one.draft)
    assert_close({name: found[name] for name in moved}, {name: expected[name] for name in moved}, tolerance=1e-4)


def test_adamw_updates_norms_and_vocabulary_with_either_optimizer() -> None:
    muon, adamw = learner(optimizer="muon"), learner(optimizer="adamw")
    for one in (muon, adamw):
        one.step(batch(0))
    for name in ("lm_head.weight", "norm.weight", "midlayer.hidden_norm.weight"):
        assert torch.equal(weights(muon.draft)[name], weights(adamw.draft)[name])
    assert not torch.equal(muon.draft.fc.weight, adamw.draft.fc.weight)


def test_norms_do_not_decay_and_matrices_do() -> None:
    plain, decayed = learner(weight_decay=0.0), learner(weight_decay=0.9)
    for one in (plain, decayed):
        one.step(batch(0))
    assert torch.equal(plain.draft.norm.weight, decayed.draft.norm.weight)
    assert not torch.equal(plain.draft.lm_head.weight, decayed.draft.lm_head.weight)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_restored_learner_takes_the_same_steps(optimizer: str, ema: float) -> None:
    through, resumed = learner(optimizer=optimizer, ema_decay=ema), learner(optimizer=optimizer, ema_decay=ema)
    for i in range(3):
        through.step(batch(i))
    resumed.step(batch(9))
    resumed.restore({name: value.clone() for name, value in through.state_tensors().items()}, through.steps)
    for i in range(3, 6):
        assert torch.equal(through.step(batch(i)).total, resumed.step(batch(i)).total)
    for a, b in ((through.draft, resumed.draft), (through.export_draft(), resumed.export_draft())):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def head_over(kept: range) -> dict[str, torch.Tensor]:
    """Return head and vocabulary of an untrained draft over other tokens."""
    state = random_draft(SHAPE, 7, torch.tensor(kept)).state_dict()
    return {name: state[name] for name in ("lm_head.weight", "d2t", "t2d")}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_changed_vocabulary_keeps_all_that_is_known_of_the_tokens_of_both(optimizer: str) -> None:
    one, fresh = learner(optimizer=optimizer, ema_decay=0.9), head_over(range(10, 26))
    for i in range(3):
        one.step(batch(i))
    hidden = torch.randn(5, SHAPE.hidden_size, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in one.state_tensors().items()}
    logits = [draft.logits(hidden) for draft in (one.draft, one.export_draft())]
    one.change_vocabulary(fresh)
    assert one.steps == 3
    after = one.state_tensors()
    assert after.keys() == before.keys()
    heads = {"draft/lm_head.weight", "ema/lm_head.weight", "exp_avg/lm_head.weight", "exp_avg_sq/lm_head.weight"}
    for name, value in after.items():
        if name in heads:
            assert torch.equal(value[:6], before[name][10:]), name  # tokens 10 to 15, which both have
            new = fresh["lm_head.weight"] if name.startswith(("draft", "ema")) else torch.zeros(16, 8)
            assert torch.equal(value[6:], new[6:]), name
        elif name not in ("draft/d2t", "draft/t2d"):
            assert torch.equal(value, before[name]), name
    for draft, known in zip((one.draft, one.export_draft()), logits, strict=True):
        assert draft.to_target_ids(torch.arange(16)).tolist() == list(range(10, 26))
        assert draft.t2d.nonzero().flatten().tolist() == list(range(10, 26))
        assert torch.equal(draft.logits(hidden)[:, :6], known[:, 10:])
    assert one.step(batch(4)).total.isfinite()


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_change_to_the_same_vocabulary_changes_nothing(ema: float) -> None:
    one, other = learner(ema_decay=ema), learner(ema_decay=ema)
    for i in range(6):
        if i in (0, 3):
            other.change_vocabulary(head_over(range(16)) if i else other.draft.state_dict())
        assert torch.equal(one.step(batch(i)).total, other.step(batch(i)).total)
    assert_close(weights(one.export_draft()), weights(other.export_draft()), 0)


def test_a_checkpoint_holds_the_changed_vocabulary(tmp_path: Path) -> None:
    one, resumed = learner(ema_decay=0.9), learner(ema_decay=0.9)
    one.step(batch(0))
    one.change_vocabulary(head_over(range(10, 26)))
    one.save(tmp_path).result()
    resumed.load(tmp_path, one.steps)
    assert torch.equal(load_draft(tmp_path, SHAPE).d2t, one.draft.d2t)
    assert torch.equal(one.step(batch(1)).total, resumed.step(batch(1)).total)
    assert torch.equal(resumed.draft.t2d, one.draft.t2d)


def test_restoring_the_first_state_resets_the_moments() -> None:
    fresh, returned = learner(), learner()
    beginning = {name: value.clone() for name, value in returned.state_tensors().items()}
    returned.step(batch(0))
    returned.restore(beginning, 0)
    for one in (fresh, returned):
        one.step(batch(1))
    assert all(torch.equal(a, b) for a, b in zip(fresh.draft.parameters(), returned.draft.parameters(), strict=True))


def test_weights_are_restored_without_the_state_of_another_optimizer() -> None:
    adamw, muon = learner(), learner(optimizer="muon")
    adamw.step(batch(0))
    muon.restore(adamw.state_tensors(), adamw.steps)
    assert torch.equal(muon.draft.fc.weight, adamw.draft.fc.weight)
    assert muon.step(batch(1)).total.isfinite()


def test_a_step_that_is_not_finite_is_skipped() -> None:
    one = learner(ema_decay=0.9)
    one.step(batch(0))
    before, average = weights(one.draft), weights(one.export_draft())
    poisoned = replace(batch(1), features_BTF=torch.full_like(batch(1).features_BTF, torch.inf))
    assert not one.step(poisoned).total.isfinite()
    assert not one.step(poisoned).total.isfinite()
    assert (one.steps, one.skipped) == (1, 2)
    assert_close(weights(one.draft), before)
    assert_close(weights(one.export_draft()), average)
    one.step(batch(2))
    assert (one.steps, one.skipped) == (2, 0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_warm_start_trains_as_with_its_own_learning_rate(optimizer: str) -> None:
    rates = {"learning_rate": 2e-2, "muon_learning_rate": 4e-2, "warm_start_learning_rate": 5e-3}
    warm = learner(optimizer=optimizer, warmup_steps=4, **rates)
    plain = learner(optimizer=optimizer, warmup_steps=4, learning_rate=5e-3, muon_learning_rate=1e-2)
    warm.use_warm_start_rate()
    for seed in range(6):
        assert warm.learning_rate == pytest.approx(plain.learning_rate)
        warm.step(batch(seed))
        plain.step(batch(seed))
    assert_close(weights(warm.draft), weights(plain.draft))
    same = learner(learning_rate=2e-2)
    same.use_warm_start_rate()
    assert same.learning_rate == 2e-2


def test_adamw_decays_its_moments_as_the_settings_say() -> None:
    one = learner(optimizer="adamw", adamw_beta1=0.5, adamw_beta2=0.75, max_grad_norm=1e9)
    mean, square = torch.zeros(()), torch.zeros(())
    for seed in range(3):
        one.step(batch(seed))
        gradient = gradients(one)["fc.weight"]
        mean, square = 0.5 * mean + 0.5 * gradient, 0.75 * square + 0.25 * gradient**2
    state = one.state_tensors()
    torch.testing.assert_close(state["exp_avg/fc.weight"], mean)
    torch.testing.assert_close(state["exp_avg_sq/fc.weight"], square)


def test_a_step_without_loss_changes_no_weight_and_does_not_count() -> None:
    one = learner(warmup_steps=10, suffix_predicted_weight=0.0, rejected_weight=0.0)
    one.step(batch(0))
    before, average, rate = weights(one.draft), weights(one.export_draft()), one.learning_rate
    one.step(collate([sample(2, length=6, known_from=6)]))
    assert one.step(replace(batch(2), suffix_predicted_BT=torch.ones_like(batch(2).known_BT))).positions > 0
    assert (one.steps, one.skipped, one.learning_rate) == (1, 0, rate)
    assert_close(weights(one.draft), before, 0)
    assert_close(weights(one.export_draft()), average, 0)


def test_bfloat16_keeps_weights_and_state_in_float32_and_trains_alike() -> None:
    half, full = learner(dtype="bfloat16"), learner()
    for i in range(6):
        a, b = half.step(batch(i % 3)), full.step(batch(i % 3))
    assert float(a.total) == pytest.approx(float(b.total), rel=0.05)
    assert all(value.dtype == torch.float32 for value in half.state_tensors().values() if value.is_floating_point())
