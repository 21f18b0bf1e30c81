"""Prequential learning: score every batch of a stream of samples before training on it.

The score is the acceptance of simulated chains (``trainer.objective.simulated_acceptance``) over all positions, bonus
token excluded: drafts of different seeds and settings are compared on the same ones. Serving accepts less, because a
verify step often begins where a draft token was rejected; ``DrafterScores`` has its figures. Replayed samples come from
earlier batches, from the replay buffer that the trainer uses. Nothing is held out: the draft is scored on what comes
next.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from schemas.settings import Train
from schemas.speculator.network import EagleDraft
from trainer.data.batch import Batch, collate
from trainer.data.replay_buffer import ReplayBuffer, ReplayEntry
from trainer.data.samples import UNLABELLED, Branch, Sample, mark_suffix_predictions, split_sample
from trainer.loop.checkpoints import CheckpointState
from trainer.loop.learner import Learner
from trainer.objective.simulated_acceptance import F64, simulate_chains
from trainer.replay.request_evaluation import merge_acceptance
from trainer.replay.verify_steps import ExpectedSteps, expect_steps

StreamKey = tuple[int, int]
"""Number of a sample in the stream, and of its part."""


class DrafterSteps(NamedTuple):
    """The verify steps that serving would run with one drafter, and the draft tokens that they accept."""

    verify_steps: float
    accepted: float


class DrafterScores(NamedTuple):
    """The draft alone, the suffix drafter alone, and both merged into one tree."""

    eagle: DrafterSteps
    suffix: DrafterSteps
    hybrid: DrafterSteps


class BatchScore(NamedTuple):
    """The score of one label's samples of one batch, before they were trained on."""

    label: str
    tokens: int
    """Committed tokens of the samples, prompts included."""
    output_tokens: int
    """Output tokens among them."""
    accepted: float
    positions: float
    static_accepted: float | None
    """Accepted tokens of the frozen draft; None where there is none."""
    drafters: DrafterScores | None = None
    """None where the suffix drafter was not replayed."""


class RunState(CheckpointState):
    """The state of a run, without tensors; with them and the stream the run resumes exactly."""

    seen: int
    """Number of samples of the stream that were trained on."""
    scores: tuple[BatchScore, ...]
    losses: tuple[float, ...]
    """Loss of the accepted term, by step."""
    trained_tokens: int
    """Tokens of all samples that were trained on, counted at each replay too."""
    training_s: float
    scoring_s: float
    replay_buffer: tuple[tuple[StreamKey, int], ...]
    """With the epochs of each."""
    random: tuple[int, tuple[int, ...], float | None]


@dataclass(slots=True, kw_only=True)
class _StreamEntry(ReplayEntry):
    key: StreamKey


class PrequentialRun:
    """A draft that learns from a stream, batch by batch."""

    def __init__(
        self,
        draft: EagleDraft,
        embeddings_VH: Tensor,
        train: Train,
        *,
        seed: int,
        lookahead: int,
        branch_nodes: int | None = None,
    ) -> None:
        """Start with a draft.

        Args:
            draft: Its weights are trained.
            embeddings_VH: The target's token embeddings. V target vocabulary, H hidden size.
            train: Settings of the training.
            seed: Seed of the replay buffer.
            lookahead: Length of the scored chains.
            branch_nodes: Maximum length of rejected branches; None keeps them whole.
        """
        self.new_per_step = train.batch_size - train.replay_batch_size
        """Samples of the stream in a batch."""
        self.static: EagleDraft | None = None
        """A frozen draft that is scored too."""
        self._train, self._lookahead, self._branch_nodes = train, lookahead, branch_nodes
        self._embeddings_VH = embeddings_VH
        self._learner = Learner(draft, embeddings_VH, train)
        self._random = random.Random(seed)  # noqa: S311
        self._replay_buffer: ReplayBuffer[_StreamEntry] = ReplayBuffer(train, self._random)
        self._scores: list[BatchScore] = []
        self._losses: list[float] = []
        self._seen = self._trained_tokens = 0
        self._training_s = self._scoring_s = 0.0

    def use_warm_start_rate(self) -> None:
        """Train with ``train.warm_start_learning_rate`` from now on."""
        self._learner.use_warm_start_rate()

    def freeze(self) -> None:
        """Score a copy of the current draft beside the one in training."""
        self.static = copy.deepcopy(self._learner.export_draft())

    def train(self, batch: Sequence[Sample], suffix: Sequence[F64] | None = None) -> None:
        """Score the next samples of the stream, then train on them.

        Args:
            batch: The samples.
            suffix: For each sample [R, K]: 1 where the suffix draft from a root is accepted to a depth, 0 where it is
                not; None scores no suffix drafter.
        """
        started = time.perf_counter()
        self._scores += self._score(batch, suffix)
        scored = time.perf_counter()
        self._losses.append(self._train_step(batch))
        self._seen += len(batch)
        self._scoring_s += scored - started
        self._training_s += time.perf_counter() - scored

    def state(self) -> RunState:
        """Return the current state."""
        return RunState(
            seen=self._seen,
            step=self._learner.steps,
            scores=tuple(self._scores),
            losses=tuple(self._losses),
            trained_tokens=self._trained_tokens,
            training_s=round(self._training_s, 2),
            scoring_s=round(self._scoring_s, 2),
            replay_buffer=tuple((entry.key, entry.epochs) for entry in self._replay_buffer),
            random=self._random.getstate(),
        )

    def export_draft(self) -> EagleDraft:
        """Return the draft that would be served now."""
        return self._learner.export_draft()

    def save(self, folder: Path) -> Future[None]:
        """Copy the tensors that ``restore`` needs beside the state, and write them from another thread."""
        return self._learner.save(folder)

    def restore(self, state: RunState, folder: Path, stream: Iterator[Sample]) -> None:
        """Restore a run with the same settings; consume the samples that it had seen from the stream."""
        epochs: dict[int, list[tuple[int, int]]] = {}
        for (number, part), count in state.replay_buffer:
            epochs.setdefault(number, []).append((part, count))
        for number, sample in zip(range(state.seen), stream, strict=False):
            parts = self._split(sample) if number in epochs else []
            for part, count in epochs.get(number, []):
                self._replay_buffer.add(_StreamEntry(sample=parts[part], epochs=count, key=(number, part)))
        self._random.setstate(state.random)
        self._learner.load(folder, state.step)
        self._scores, self._losses = list(state.scores), list(state.losses)
        self._seen, self._trained_tokens = state.seen, state.trained_tokens
        self._training_s, self._scoring_s = state.training_s, state.scoring_s

    def _score(self, batch: Sequence[Sample], suffix: Sequence[F64] | None) -> Iterator[BatchScore]:
        draft = self._learner.export_draft()
        by_label: dict[str, list[int]] = {}
        for i, sample in enumerate(batch):
            by_label.setdefault(sample.label or UNLABELLED, []).append(i)
        for label, indices in by_label.items():
            samples = [batch[i] for i in indices]
            collated = collate([replace(s, branches=()) for s in samples]).to(self._embeddings_VH.device)
            accepted, positions = simulate_positions(draft, self._embeddings_VH, collated, self._lookahead)
            static = None
            if self.static is not None:
                static, _ = simulate_positions(self.static, self._embeddings_VH, collated, self._lookahead)
            tokens, output_tokens = sum(s.committed for s in samples), sum(s.output_tokens for s in samples)
            drafters = None
            if suffix is not None:
                drafters = self._score_drafters(draft, collated, [suffix[i] for i in indices])
            yield BatchScore(label, tokens, output_tokens, accepted, positions, static, drafters)

    def _score_drafters(self, draft: EagleDraft, batch: Batch, suffix: Sequence[F64]) -> DrafterScores:
        """Walk the verify steps of every sample with each drafter."""
        roots_BT = batch.known_BT.cumsum(dim=1) > 1
        chains = simulate_chains(draft, self._embeddings_VH, batch, self._lookahead, roots_BT & batch.known_BT)
        walks: list[list[ExpectedSteps]] = []
        for b, suffix_RK in enumerate(suffix):
            reach_RK = chains.reach_BTK[b][roots_BT[b]][: len(suffix_RK)].cpu().numpy()
            before_RK = np.pad(reach_RK, ((0, 0), (1, 0)), constant_values=1.0)[:, :-1]
            eagle_RK = np.divide(reach_RK, before_RK, out=np.zeros_like(reach_RK), where=before_RK > 0)
            parts = [eagle_RK], [suffix_RK], [eagle_RK, suffix_RK]
            walks.append([expect_steps(merge_acceptance(drafts)) for drafts in parts])
        return DrafterScores(
            *(
                DrafterSteps(sum(walk.verify_steps for walk in each), sum(walk.accepted for walk in each))
                for each in zip(*walks, strict=True)
            )
        )

    def _train_step(self, batch: Sequence[Sample]) -> float:
        new = [
            _StreamEntry(sample=part, epochs=1, key=(self._seen + i, j))
            for i, sample in enumerate(batch)
            for j, part in enumerate(self._split(sample))
        ]
        samples = [entry.sample for entry in [*new, *self._replay_buffer.draw(self._train.replay_batch_size)]]
        for entry in new:
            self._replay_buffer.add(entry)
        self._trained_tokens += sum(map(len, samples))
        return round(self._learner.step(collate(samples)).accepted, 4)

    def _split(self, sample: Sample) -> list[Sample]:
        if self._train.suffix_predicted_weight != 1:
            sample = mark_suffix_predictions(sample)
        parts = split_sample(sample, self._train.max_sample_tokens, self._train.context_tokens)
        nodes = self._branch_nodes
        return parts if nodes is None else [cut_branches(part, nodes) for part in parts]


def simulate_positions(draft: EagleDraft, embeddings_VH: Tensor, batch: Batch, lookahead: int) -> tuple[float, int]:
    """Count the accepted tokens of chains of ``lookahead`` tokens from all positions, and the positions.

    A chain starts after every token with a known target distribution, if the sample has ``lookahead`` more tokens.
    """
    token_T = torch.arange(batch.tokens_BT.shape[1], device=batch.lengths_B.device)
    roots_BT = batch.known_BT & (token_T > 0) & (token_T + lookahead < batch.lengths_B[:, None])
    chains = simulate_chains(draft, embeddings_VH, batch, lookahead, roots_BT)
    return float(chains.accepted_BTK.sum()), int(roots_BT.sum())


def cut_branches(sample: Sample, nodes: int) -> Sample:
    """Return the sample as if at most ``nodes`` tokens had been drafted; branches rejected later are dropped."""
    return replace(sample, branches=tuple(_cut(b, nodes) for b in sample.branches if b.accepted_prefix < nodes))


def _cut(branch: Branch, nodes: int) -> Branch:
    return replace(
        branch,
        tokens=branch.tokens[:nodes],
        draft_logprobs=branch.draft_logprobs[:nodes],
        teacher=branch.teacher[:nodes],
    )
