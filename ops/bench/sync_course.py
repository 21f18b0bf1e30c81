"""A draft learns from recorded traffic, block by block: its versions, and how each of them does on each block."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from ops.bench.learning.prequential import in_order
from ops.bench.learning.traffic import Traffic
from ops.bench.learning.variants import LOOKAHEAD, PLAN, Order, Trial, settings_of
from schemas.settings import Settings
from schemas.speculator.network import EagleDraft
from trainer.data.target import read_target
from trainer.objective.simulated_acceptance import accepted_per_step
from trainer.replay import prequential

Say = Callable[[str], None]


class Course:
    """Blocks of traffic in their order; version ``b`` has learned from the blocks before ``b``, version 0 is random."""

    def __init__(self, settings: Settings, traffic: Traffic, order: Order, blocks: int, say: Say) -> None:
        """Learn from all but the last block; takes as long as a trainer would."""
        trial = Trial(next(variant for variant in PLAN if variant.name == "base"), order, 0)
        settings = settings_of(settings, trial)
        torch.set_num_threads(settings.train.num_threads)
        torch.manual_seed(trial.seed)
        stream = in_order(traffic, order, trial.seed)
        size = -(-len(stream) // blocks)
        self._blocks = [stream[start : start + size] for start in range(0, len(stream), size)]
        self._embeddings = (target := read_target(settings)).embeddings_VH
        self._lengths: dict[tuple[int, int], float] = {}
        learning = prequential.Course(
            target.new_draft(), self._embeddings, settings.train, seed=trial.seed, lookahead=LOOKAHEAD
        )
        self._versions: list[EagleDraft] = [copy.deepcopy(learning.weights())]
        for number, block in enumerate(self._blocks[:-1], start=1):
            for start in range(0, len(block), learning.batch):
                learning.take(block[start : start + learning.batch])
            self._versions.append(copy.deepcopy(learning.weights()))
            say(f"{order} traffic: learned from block {number} of {len(self._blocks) - 1}")

    @property
    def answered(self) -> list[int]:
        """Answered tokens of each block."""
        return [sum(asked.answered for asked in block) for block in self._blocks]

    @property
    def newest(self) -> EagleDraft:
        """The last version."""
        return self._versions[-1]

    def length(self, version: int, block: int) -> float:
        """The accepted tokens per step of a version on a block, by greedy chains; each pair is scored once."""
        if (version, block) not in self._lengths:
            windows = [asked.window for asked in self._blocks[block]]
            found = accepted_per_step(self._versions[version], self._embeddings, windows, LOOKAHEAD)
            self._lengths[version, block] = found.length
        return self._lengths[version, block]
