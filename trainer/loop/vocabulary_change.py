"""Change the draft vocabulary in training when it covers too little of the traffic.

A version holds its own draft vocabulary, so one with other tokens is compared, promoted and rolled back as any other.
Its size is the line's. Only the built-in engine swaps it in while it serves: SGLang reads the ids once, at its start.
"""

from __future__ import annotations

from pathlib import Path

import structlog
import torch

from schemas.settings import Settings
from schemas.speculator.day_0_draft import create_day_0_draft
from trainer.data.draft_vocabulary import Halves, propose_vocabulary, share_covered, special_ids, sum_halves
from trainer.loop.distributed import DistributedLearner
from trainer.loop.learner import Learner
from trainer.loop.metrics import TrainMetrics

log = structlog.get_logger()

MIN_GENERATED_TOKENS = 5_000
"""Self-generated output tokens that are counted before they change the vocabulary."""


class VocabularyChange:
    """Measures the coverage of the draft vocabulary, and changes it in the learners of all ranks."""

    def __init__(self, settings: Settings, learners: DistributedLearner, metrics: TrainMetrics) -> None:
        self.coverage: float | None = None
        """Share of the counted output tokens within the draft vocabulary; None before the first are counted."""
        self._speculator, self._train, self._folder = settings.speculator, settings.train, Path(settings.target.path)
        self._min_coverage = settings.train.draft_vocab_min_coverage if settings.serve.engine == "builtin" else 0.0
        self._learners, self._metrics = learners, metrics
        self._kept = special_ids(self._folder, learners.learner.shape.vocab_size)

    def update(self, halves: Halves, *, is_generated: bool = False) -> None:
        """Measure the coverage; change the vocabulary if another one covers clearly more.

        Args:
            halves: Counts of the traffic's output tokens.
            is_generated: They are those of self-generated data, of which fewer suffice: traffic corrects the choice.

        Raises:
            CheckpointError: the target's output layer cannot be read; nothing has changed.
        """
        draft, counts = self._learners.learner.draft, sum_halves(halves)
        if not counts:
            return
        current = draft.t2d.nonzero().flatten().tolist()
        self.coverage = share_covered(counts, current)
        self._metrics.draft_vocab_coverage.set(self.coverage)
        min_tokens = self._train.draft_vocab_min_tokens
        proposal = propose_vocabulary(
            halves,
            current,
            self._kept,
            draft.shape.vocab_size,
            min_coverage=self._min_coverage,
            min_tokens=min(min_tokens, MIN_GENERATED_TOKENS) if is_generated else min_tokens,
        )
        if proposal is None:
            return
        fresh = create_day_0_draft(self._folder, self._speculator, torch.tensor(proposal.ids)).state_dict()
        self._learners.call(Learner.change_vocabulary, {name: fresh[name] for name in ("lm_head.weight", "d2t", "t2d")})
        log.info(
            "draft_vocabulary_changed",
            step=self._learners.learner.steps,
            coverage_before=round(self.coverage, 4),
            coverage_estimate=round(proposal.coverage, 4),
            tokens_replaced=len(set(proposal.ids).difference(current)),
            tokens_counted=sum(counts.values()),
        )
        self.coverage = share_covered(counts, proposal.ids)
        self._metrics.draft_vocab_coverage.set(self.coverage)
        self._metrics.draft_vocab_changes.inc()
