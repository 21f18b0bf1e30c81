"""One of several processes that train random drafts together; rank 0 writes the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from schemas.settings import Train
from schemas.speculator.network import DraftShape, random_draft
from trainer.data.batch import collate
from trainer.data.samples import Branch, Sample, Teacher
from trainer.loop.distributed import Ranks, TorchrunRanks, join_ranks
from trainer.loop.learner import Learner

SHAPE = DraftShape(16, 24, 2, 1, 8, 32, 20, 1e-6, 100.0, 64, (1, 2, 3))
SAMPLES = 5
"""Samples of a step: the first of two ranks gets one more."""


def sample(seed: int) -> Sample:
    """Return a sample of varying length, some with a rejected branch; every seventh has no teacher."""
    g = torch.Generator().manual_seed(seed)
    length = 6 + seed % 5

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


def train(out: Path, steps: int, settings: Train, ranks: Ranks | TorchrunRanks) -> None:
    """Train, and restore the state half-way, as after a restart."""
    embeddings = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    learner = Learner(random_draft(SHAPE, 0), embeddings, settings, ranks)
    losses = []
    for step in range(steps):
        if step == steps // 2:
            kept = {name: value.clone() for name, value in learner.state_tensors().items()}
            learner = Learner(random_draft(SHAPE, 1), embeddings, settings, ranks)
            learner.restore(kept, step)
        samples = [sample(step % 2 * SAMPLES + i) for i in range(SAMPLES)][ranks.rank :: ranks.size]
        parts = [
            collate(samples[i :: settings.gradient_accumulation_steps])
            for i in range(settings.gradient_accumulation_steps)
        ]
        losses.append(float(learner.step(*parts).total))
    tensors, draft = learner.state_tensors(), learner.export_draft()
    if ranks.rank == 0:
        out.mkdir(parents=True)
        (out / "curve.json").write_text(json.dumps({"losses": losses, "ranks": ranks.size}))
        save_file({name: value.contiguous() for name, value in tensors.items()}, out / "state.safetensors")
        save_file(draft.state_dict(), out / "draft.safetensors")


def main(out: Path, steps: int, trainings: list[Train]) -> None:
    """Run the trainings one after the other, each into a folder named by its number."""
    torch.set_num_threads(1)
    with join_ranks(torch.device("cpu")) as ranks:
        for number, settings in enumerate(trainings):
            train(out / str(number), steps, settings, ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [Train.model_validate(one) for one in json.loads(sys.argv[3])])
