"""This project's trainer as a worker of ``aurora bench trainer``.

Run as ``python -m ops.bench.trainer_ours DATA THREADS TYPES``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ops.bench.trainer_data import shape_of, window
from ops.bench.trainer_worker import CLIP, DECAY, LEARNING_RATE, TYPES, Tensors, main
from schemas.settings import Train
from schemas.speculator.network import EagleDraft
from trainer.data.samples import Window, collate
from trainer.loop.learner import Learner


class Ours:
    """The learner over windows that hold the recorded teacher, as they come from the table."""

    modules: tuple[str, ...] = ()
    ways: tuple[str, ...] = TYPES

    def __init__(self, weights: Tensors, config: Mapping[str, Any]) -> None:
        self._embeddings = weights["embed_tokens.weight"]
        self._draft = EagleDraft(shape_of(config))
        self._draft.load_state_dict({name: value for name, value in weights.items() if name != "embed_tokens.weight"})
        self._learners: dict[tuple[int, str], Learner] = {}
        self._windows: tuple[Tensors, list[Window]] = {}, []

    def step(self, sequences: Tensors, ttt_steps: int, way: str) -> float:
        """Collate the windows and learn from them."""
        if self._windows[0] is not sequences:
            self._windows = (
                sequences,
                [
                    window(tokens, features, last, self._embeddings[: self._draft.shape.draft_vocab_size])
                    for tokens, features, last in zip(
                        *(sequences[n] for n in ("tokens", "features", "last")), strict=True
                    )
                ],
            )
        return float(self._learner(ttt_steps, way).step(collate(self._windows[1])).total.detach())

    def _learner(self, ttt_steps: int, dtype: str) -> Learner:
        """The learner for so many steps: one at a time, as the moments of its optimizer take memory."""
        if (ttt_steps, dtype) not in self._learners:
            train = Train.model_validate(
                {
                    "optimizer": "adamw",
                    "dtype": dtype,
                    "learning_rate": LEARNING_RATE,
                    "warmup_steps": 0,
                    "max_grad_norm": CLIP,
                    "ttt_steps": ttt_steps,
                    "ttt_decay": DECAY,
                    "rejected_weight": 0.0,
                }
            )
            self._learners = {(ttt_steps, dtype): Learner(self._draft, self._embeddings, train)}
        return self._learners[ttt_steps, dtype]


if __name__ == "__main__":
    main(Ours, "aurora-stream", Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","))
