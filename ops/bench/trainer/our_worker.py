"""This project's trainer as a worker of ``aurora bench trainer``.

Run as ``python -m ops.bench.trainer.our_worker DATA THREADS TYPES``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ops.bench.trainer.peer_worker import DECAY, LEARNING_RATE, MAX_GRAD_NORM, TYPES, Tensors, main
from ops.bench.trainer.synthetic_data import build_sample, read_shape
from schemas.settings import Train
from schemas.speculator.network import EagleDraft
from trainer.data.batch import collate
from trainer.data.samples import Sample
from trainer.loop.learner import Learner


class AuroraTrainer:
    """The learner over samples with the recorded teacher, as they are read from the table."""

    modules: tuple[str, ...] = ()
    ways: tuple[str, ...] = TYPES

    def __init__(self, weights: Tensors, config: Mapping[str, Any]) -> None:
        self._embeddings = weights["embed_tokens.weight"]
        self.draft = EagleDraft(read_shape(config))
        self.draft.load_state_dict({name: value for name, value in weights.items() if name != "embed_tokens.weight"})
        self._learners: dict[tuple[int, str], Learner] = {}
        self._samples: tuple[Tensors, list[Sample]] = {}, []

    def step(self, sequences: Tensors, ttt_steps: int, way: str) -> float:
        """Collate the samples and train on them."""
        if self._samples[0] is not sequences:
            head_DH = self._embeddings[: self.draft.shape.draft_vocab_size]
            rows = zip(*(sequences[name] for name in ("tokens", "features", "last")), strict=True)
            samples = [build_sample(tokens, features, last, head_DH) for tokens, features, last in rows]
            self._samples = sequences, samples
        return float(self._learner(ttt_steps, way).step(collate(self._samples[1])).total.detach())

    def _learner(self, ttt_steps: int, dtype: str) -> Learner:
        """Return the learner of a case; only one exists at a time, as the moments of its optimizer take memory."""
        if (ttt_steps, dtype) not in self._learners:
            train = Train.model_validate(
                {
                    "optimizer": "adamw",
                    "dtype": dtype,
                    "learning_rate": LEARNING_RATE,
                    "warmup_steps": 0,
                    "max_grad_norm": MAX_GRAD_NORM,
                    "ttt_steps": ttt_steps,
                    "ttt_decay": DECAY,
                    "rejected_weight": 0.0,
                }
            )
            self._learners = {(ttt_steps, dtype): Learner(self.draft, self._embeddings, train)}
        return self._learners[ttt_steps, dtype]


if __name__ == "__main__":
    main(AuroraTrainer, "aurora-stream", Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","))
