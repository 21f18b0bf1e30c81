"""One of several processes that train random drafts together; rank 0 writes the results."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from schemas.settings import Train
from schemas.speculator.network import DraftShape, EagleDraft, random_draft
from trainer.data.batch import build_step_batch, collate
from trainer.data.feature_files import FeatureFiles
from trainer.data.samples import Branch, Sample, Teacher
from trainer.loop.checkpoints import load_tensors, save_tensors
from trainer.loop.distributed import (
    DistributedLearner,
    Ranks,
    TorchrunRanks,
    follow_rank_0,
    gather_tensor,
    join_ranks,
)
from trainer.loop.learner import Learner

SHAPE = DraftShape(16, 24, 2, 1, 8, 32, 20, 1e-6, 100.0, 64, (1, 2, 3))
SAMPLES = 5
"""Samples of a step: the first of two ranks gets one more."""
LONG = 400
"""Tokens of a sample whose features are most of its bytes."""


def sample(seed: int, tokens: int = 6) -> Sample:
    """Return a sample of varying length, some with a rejected branch; every seventh has no teacher."""
    g = torch.Generator().manual_seed(seed)
    length = tokens + seed % 5

    def teacher(n: int) -> Teacher:
        return Teacher(torch.randint(0, 20, (n, 2), generator=g), torch.log(torch.rand(n, 2, generator=g) * 0.5))

    known = torch.arange(length) >= (2 if seed % 7 else length)
    return Sample(
        request=f"r{seed}",
        tokens=torch.randint(0, 32, (length,), generator=g),
        next_token=3,
        features=torch.randn(length, SHAPE.feature_width, generator=g).bfloat16(),
        known=known,
        teacher=teacher(int(known.sum())),
        branches=(Branch(4, (1, 2), 0, (-0.5, -0.5), teacher(2)),) if seed % 3 == 0 else (),
    )


def head_over(first: int) -> dict[str, torch.Tensor]:
    """Return head and vocabulary of an untrained draft over the tokens from the first one on."""
    state = random_draft(SHAPE, 2, first + torch.arange(SHAPE.draft_vocab_size)).state_dict()
    return {name: state[name] for name in ("lm_head.weight", "d2t", "t2d")}


def train(out: Path, steps: int, settings: Train, ranks: Ranks | TorchrunRanks) -> None:
    """Train, and restore the state half-way, as after a restart: of these ranks, then of one, and again of these.

    After two steps the draft vocabulary changes.
    """
    embeddings = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    learner = Learner(random_draft(SHAPE, 0), embeddings, settings, ranks)
    losses = []
    for step in range(steps):
        if step == 2:
            learner.change_vocabulary(head_over(3))
        if step == steps // 2:
            learner.save(out / "sharded").result()
            if ranks.rank == 0:
                save_tensors(load_tensors(out / "sharded"), out / "whole").result()
            if ranks.size > 1:
                dist.barrier()
            learner = Learner(random_draft(SHAPE, 1), embeddings, settings, ranks)
            learner.load(out / "whole", step)
        samples = [sample(step % 2 * SAMPLES + i) for i in range(SAMPLES)][ranks.rank :: ranks.size]
        parts = [
            collate(samples[i :: settings.gradient_accumulation_steps])
            for i in range(settings.gradient_accumulation_steps)
        ]
        losses.append(float(learner.step(*parts).total))
    learner.save(out / "end").result()
    tensors, draft = gather_state(learner), learner.export_draft()
    if ranks.rank == 0:
        write(out, {"losses": losses, "ranks": ranks.size}, tensors, draft)


def train_from_rank_0(out: Path, steps: int, settings: Train, ranks: Ranks | TorchrunRanks) -> None:
    """Train on long samples as the trainer does: rank 0 selects them, and the others read their features from files."""
    embeddings = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    learner = Learner(random_draft(SHAPE, 0), embeddings, settings, ranks)
    if ranks.rank:
        follow_rank_0(learner)
        return
    learners, folder = DistributedLearner(learner, ranks), out.parent / f"features-{out.name}"
    files = FeatureFiles(folder) if learners.share_folder(folder) else None
    losses, sent, features = [], [], []
    for step in range(steps):
        if step == 2:
            learners.call(Learner.change_vocabulary, head_over(3))
        samples = [sample(step % 2 * SAMPLES + i, LONG) for i in range(SAMPLES)]
        features.append(sum(one.feature_bytes for one in samples[1 :: ranks.size]))
        stored = [files.store(one) for one in samples] if files else samples
        with counting_bytes() as messages:
            losses.append(
                float(learners.step(build_step_batch(stored, ranks.size, settings.gradient_accumulation_steps)).total)
            )
        sent.append(sum(messages))
    tensors, draft = learners.call(gather_state), learners.call(Learner.export_draft)
    learners.close()
    write(out, {"losses": losses, "ranks": ranks.size, "sent": sent, "features": features}, tensors, draft)


def gather_state(learner: Learner) -> dict[str, torch.Tensor]:
    """Return the whole state; on all ranks."""
    return {name: gather_tensor(value) for name, value in learner.state_tensors().items()}


@contextmanager
def counting_bytes() -> Iterator[list[int]]:
    """Yield the sizes of the objects that this process broadcasts or scatters."""
    sizes: list[int] = []
    broadcast, scatter = dist.broadcast_object_list, dist.scatter_object_list

    def count_broadcast(objects: list[object]) -> None:
        sizes.append(len(pickle.dumps(objects)))
        broadcast(objects)

    def count_scatter(received: list[object], objects: list[object]) -> None:
        sizes.append(len(pickle.dumps(objects)))
        scatter(received, objects)

    with (
        patch.object(dist, "broadcast_object_list", count_broadcast),
        patch.object(dist, "scatter_object_list", count_scatter),
    ):
        yield sizes


def write(out: Path, figures: dict[str, object], tensors: dict[str, torch.Tensor], draft: EagleDraft) -> None:
    """Write the results of a training."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "curve.json").write_text(json.dumps(figures))
    save_file({name: value.contiguous() for name, value in tensors.items()}, out / "state.safetensors")
    save_file(draft.state_dict(), out / "draft.safetensors")


def main(out: Path, steps: int, trainings: list[Train], run: Callable[..., None]) -> None:
    """Run the trainings one after the other, each into a folder named by its number."""
    torch.set_num_threads(1)
    with join_ranks(torch.device("cpu")) as ranks:
        for number, settings in enumerate(trainings):
            run(out / str(number), steps, settings, ranks)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        [Train.model_validate(one) for one in json.loads(sys.argv[3])],
        train_from_rank_0 if "from-rank-0" in sys.argv else train,
    )
