"""How a step's windows come to ranks and parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training_rank import SHAPE, window

from schemas.settings import Train
from schemas.speculator.network import random_draft
from trainer.loop.distributed import Alone
from trainer.loop.learner import Learner
from trainer.loop.replicas import Adopt, Restore, Team, work_of

WINDOWS = [replace(window(seed), time=1000.0 + seed) for seed in range(1, 6)]
EMBEDDINGS = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))


def learner() -> Learner:
    return Learner(
        random_draft(SHAPE, 0), EMBEDDINGS, Train(dtype="float32", ema_decay=0.0, warmup_steps=0, rejected_min_prob=0.0)
    )


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (4, 9), (8, 3)])
def test_every_window_is_learned_from_once_and_all_ranks_take_as_many_passes(ranks: int, parts: int) -> None:
    work = work_of(WINDOWS, ranks, parts)
    assert len(work.shares) == ranks
    assert len({len(share) for share in work.shares}) == 1
    assert work.consumed == sum(map(len, WINDOWS))
    assert work.newest == 1005.0
    taught = sum(int(batch.known_BT.sum()) for share in work.shares for batch in share)
    assert taught == sum(int(w.known.sum()) for w in WINDOWS)


def test_a_team_of_one_is_its_learner() -> None:
    alone, team = learner(), Team(learner(), Alone())
    work = work_of(WINDOWS, 1, 1)
    assert torch.equal(team.step(work).total, alone.step(*work.shares[0]).total)
    assert team.weights() is team.learner.draft
    kept = {name: value.clone() for name, value in team.tensors().items()}
    team.step(work)
    team.restore(kept, 1)
    assert team.learner.steps == 1
    assert torch.equal(team.learner.draft.fc.weight, alone.draft.fc.weight)


def test_orders_do_what_the_learner_does() -> None:
    one, other = learner(), learner()
    one.step(*work_of(WINDOWS, 1, 1).shares[0])
    Restore(one.tensors(), one.steps)(other)
    assert torch.equal(other.draft.fc.weight, one.draft.fc.weight)
    Adopt(random_draft(SHAPE, 0).state_dict())(other)
    assert torch.equal(other.draft.fc.weight, random_draft(SHAPE, 0).fc.weight)
