"""How the samples of a step are spread over ranks and gradient accumulation."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_rank import SHAPE, sample

from schemas.settings import Train
from schemas.speculator.network import random_draft
from trainer.data.batch import build_step_batch, collate_share
from trainer.data.feature_files import FeatureFiles
from trainer.loop.distributed import DistributedLearner, Ranks
from trainer.loop.learner import Learner

SAMPLES = [replace(sample(seed), time=1000.0 + seed) for seed in range(1, 6)]
EMBEDDINGS = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))


def learner() -> Learner:
    return Learner(
        random_draft(SHAPE, 0), EMBEDDINGS, Train(dtype="float32", ema_decay=0.0, warmup_steps=0, rejected_min_prob=0.0)
    )


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (4, 9), (8, 3)])
def test_every_sample_is_trained_on_once_and_all_ranks_have_equally_many_batches(ranks: int, parts: int) -> None:
    batch = build_step_batch(SAMPLES, ranks, parts)
    shares = [batch.batches, *map(collate_share, batch.shares)]
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1
    assert batch.tokens == sum(map(len, SAMPLES))
    assert batch.newest == 1005.0
    known = sum(int(part.known_BT.sum()) for share in shares for part in share)
    assert known == sum(int(w.known.sum()) for w in SAMPLES)


def test_with_one_process_the_distributed_learner_equals_its_learner() -> None:
    alone, learners = learner(), DistributedLearner(learner(), Ranks())
    batch = build_step_batch(SAMPLES, 1, 1)
    assert torch.equal(learners.step(batch).total, alone.step(*batch.batches).total)
    assert learners.call(Learner.export_draft) is learners.learner.draft
    kept = {name: value.clone() for name, value in learners.call(Learner.state_tensors).items()}
    learners.step(batch)
    learners.call(Learner.restore, kept, 1)
    assert learners.learner.steps == 1
    assert torch.equal(learners.learner.draft.fc.weight, alone.draft.fc.weight)


def test_broadcast_calls_change_a_learner_as_direct_calls_do() -> None:
    one, other = learner(), learner()
    one.step(*build_step_batch(SAMPLES, 1, 1).batches)
    method, args = pickle.loads(pickle.dumps((Learner.restore, (one.state_tensors(), one.steps))))
    method(other, *args)
    assert torch.equal(other.draft.fc.weight, one.draft.fc.weight)
    method, args = pickle.loads(pickle.dumps((Learner.load_weights, (random_draft(SHAPE, 0).state_dict(),))))
    method(other, *args)
    assert torch.equal(other.draft.fc.weight, random_draft(SHAPE, 0).fc.weight)


def test_what_other_ranks_are_sent_does_not_grow_with_the_features(tmp_path: Path) -> None:
    def sent(width: int) -> int:
        files = FeatureFiles(tmp_path)
        wide = [replace(one, features=torch.zeros(len(one), width).bfloat16()) for one in SAMPLES]
        return len(pickle.dumps(build_step_batch([files.store(one) for one in wide], 2, 1).shares))

    assert sent(3 * 8192) <= sent(48) + 100


def test_what_other_ranks_are_sent_does_not_grow_with_the_request(tmp_path: Path) -> None:
    def sent(preceding: int) -> int:
        late = [replace(one, preceding=torch.zeros(preceding, dtype=torch.int64)) for one in SAMPLES]
        return len(pickle.dumps(build_step_batch(late, 2, 1).shares))

    assert sent(100_000) == sent(0)


def test_a_share_read_from_files_equals_the_samples_in_memory(tmp_path: Path) -> None:
    files = FeatureFiles(tmp_path)
    found = build_step_batch([files.store(one) for one in SAMPLES], 2, 2)
    expected = build_step_batch(SAMPLES, 2, 2)
    for one, other in zip(
        [*found.batches, *collate_share(found.shares[0])],
        [*expected.batches, *collate_share(expected.shares[0])],
        strict=True,
    ):
        assert torch.equal(one.features_BTF, other.features_BTF)
        assert torch.equal(one.tokens_BT, other.tokens_BT)
