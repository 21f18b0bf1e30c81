"""Learning from a stream of the past: every batch of windows is scored before it is learned from (prequential).

The score is the accepted tokens per step that greedy chains would have had
(``trainer.objective.simulated_acceptance``): joint,
over all positions, the
bonus token excluded. Replayed windows come from the batches before, as the trainer's feed draws them. Of a stream all
is learned from: what comes next is what the draft is held to, so nothing need be held out.
"""

from __future__ import annotations

import copy
import random
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from schemas.settings import Train
from schemas.speculator.network import EagleDraft
from trainer.data import replay_sampler
from trainer.data.samples import Branch, Window, collate, cut
from trainer.loop.learner import Learner
from trainer.objective.simulated_acceptance import simulated_accepted_per_step

Key = tuple[int, int]
"""Number of a request in the stream, and of the piece of its window."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A window of the stream, and the traffic that it belongs to."""

    domain: str
    window: Window

    @property
    def tokens(self) -> int:
        """Committed tokens, prompt and answer."""
        return len(self.window) + (self.window.next_token is not None)

    @property
    def answered(self) -> int:
        """Tokens of the answer: each one was chosen from a distribution that is known."""
        return int(self.window.known.sum())


class Point(NamedTuple):
    """The score of one domain's requests of one batch, before they were learned from."""

    domain: str
    tokens: int
    """Committed tokens of the requests, prompts included."""
    answered: int
    """Those of them that the target answered."""
    accepted: int
    positions: int
    static_accepted: int | None
    """The same by the draft that was frozen on the way; None before that, and where none is."""


class Standing(BaseModel):
    """Where a course stands, apart from tensors; with them and the stream it goes on as if it had never stopped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seen: int
    """Windows of the stream that were learned from."""
    steps: int
    points: tuple[Point, ...]
    losses: tuple[float, ...]
    """Of the accepted term, by step."""
    trained_tokens: int
    """Tokens of all windows that were learned from, replayed ones each time."""
    training_s: float
    scoring_s: float
    history: tuple[tuple[Key, int], ...]
    """With the passes made over each."""
    random: tuple[int, tuple[int, ...], float | None]


@dataclass(slots=True)
class _Passed:
    key: Key
    domain: str
    window: Window
    passes: int = 1


class History:
    """Windows that were learned from, to learn from again; drawn as the trainer's feed draws them."""

    def __init__(self, train: Train, seed: int) -> None:
        self._passed: deque[_Passed] = deque(maxlen=train.replay_buffer_size)
        self._train = train
        self._random = random.Random(seed)  # noqa: S311

    def draw(self, number: int) -> list[Window]:
        """So many windows, or as many as there are that may be passed over again."""
        newest, most = len(self._passed) - 1, self._train.max_epochs
        rested = [(newest - i, passed) for i, passed in enumerate(self._passed) if passed.passes < most]
        ages, domains = [age for age, _ in rested], [passed.domain for _, passed in rested]
        odds = replay_sampler.log_odds(ages, domains, self._train.replay_half_life, self._train.label_balance)
        drawn = [rested[i][1] for i in replay_sampler.draw(self._random, odds, number)]
        for passed in drawn:
            passed.passes += 1
        return [passed.window for passed in drawn]

    def add(self, key: Key, domain: str, window: Window, passes: int = 1) -> None:
        """Take a window in that is learned from for the first time, or that was passed over so often."""
        self._passed.append(_Passed(key, domain, window, passes))

    @property
    def passes(self) -> tuple[tuple[Key, int], ...]:
        """Every window by its key, with the passes made over it; the oldest one first."""
        return tuple((passed.key, passed.passes) for passed in self._passed)

    @property
    def random(self) -> random.Random:
        """What windows are drawn with."""
        return self._random


class Course:
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
        """Begin with a draft.

        Args:
            draft: Its weights change.
            embeddings_VH: The target's.
            train: How to learn.
            seed: Of what is replayed.
            lookahead: Length of the chains that are scored.
            branch_nodes: Rejected branches are cut to so many tokens; None leaves them whole.
        """
        self.batch = train.batch_size - train.replay_batch_size
        """Windows of the stream in a batch."""
        self.static: EagleDraft | None = None
        """A frozen draft that is scored beside."""
        self._train, self._lookahead, self._branch_nodes = train, lookahead, branch_nodes
        self._embeddings = embeddings_VH
        self._learner = Learner(draft, embeddings_VH, train)
        self._history = History(train, seed)
        self._points: list[Point] = []
        self._losses: list[float] = []
        self._seen = self._trained_tokens = 0
        self._training_s = self._scoring_s = 0.0

    def freeze(self) -> None:
        """Score the draft of now beside the one that learns on."""
        self.static = copy.deepcopy(self._learner.weights())

    def take(self, batch: Sequence[Asked]) -> None:
        """Score the next windows of the stream, then learn from them."""
        started = time.perf_counter()
        self._points += self._scores(batch)
        scored = time.perf_counter()
        self._losses.append(self._learn(batch))
        self._seen += len(batch)
        self._training_s += time.perf_counter() - scored
        self._scoring_s += scored - started

    def standing(self) -> Standing:
        """Where the course stands now."""
        return Standing(
            seen=self._seen,
            steps=self._learner.steps,
            points=tuple(self._points),
            losses=tuple(self._losses),
            trained_tokens=self._trained_tokens,
            training_s=round(self._training_s, 2),
            scoring_s=round(self._scoring_s, 2),
            history=self._history.passes,
            random=self._history.random.getstate(),
        )

    def weights(self) -> EagleDraft:
        """What would be served now."""
        return self._learner.weights()

    def tensors(self) -> dict[str, Tensor]:
        """What ``restore`` needs beside the standing."""
        return self._learner.tensors()

    def restore(self, standing: Standing, tensors: Mapping[str, Tensor], stream: Iterator[Asked]) -> None:
        """Stand where a course of the same settings stood; takes what it had seen from the stream."""
        passes: dict[int, list[tuple[int, int]]] = {}
        for (number, piece), made in standing.history:
            passes.setdefault(number, []).append((piece, made))
        for number, asked in zip(range(standing.seen), stream, strict=False):
            pieces = self._pieces(asked) if number in passes else []
            for piece, made in passes.get(number, []):
                self._history.add((number, piece), asked.domain, pieces[piece], made)
        self._history.random.setstate(standing.random)
        self._learner.restore(tensors, standing.steps)
        self._points, self._losses = list(standing.points), list(standing.losses)
        self._seen, self._trained_tokens = standing.seen, standing.trained_tokens
        self._training_s, self._scoring_s = standing.training_s, standing.scoring_s

    def _scores(self, batch: Sequence[Asked]) -> Iterator[Point]:
        draft = self._learner.weights()
        by_domain: dict[str, list[Asked]] = {}
        for one in batch:
            by_domain.setdefault(one.domain, []).append(one)
        for domain, asked in by_domain.items():
            together = collate([replace(one.window, branches=()) for one in asked]).to(self._embeddings.device)
            found = simulated_accepted_per_step(draft, self._embeddings, together, self._lookahead)
            static = None
            if self.static is not None:
                static = simulated_accepted_per_step(self.static, self._embeddings, together, self._lookahead).tokens
            yield Point(
                domain,
                sum(one.tokens for one in asked),
                sum(one.answered for one in asked),
                found.tokens,
                found.positions,
                static,
            )

    def _learn(self, batch: Sequence[Asked]) -> float:
        new = [
            ((self._seen + i, j), asked.domain, piece)
            for i, asked in enumerate(batch)
            for j, piece in enumerate(self._pieces(asked))
        ]
        windows = [*(piece for _, _, piece in new), *self._history.draw(self._train.replay_batch_size)]
        for key, domain, piece in new:
            self._history.add(key, domain, piece)
        self._trained_tokens += sum(map(len, windows))
        return round(self._learner.step(collate(windows)).accepted, 4)

    def _pieces(self, asked: Asked) -> list[Window]:
        pieces, nodes = cut(asked.window, self._train.max_sample_tokens), self._branch_nodes
        return pieces if nodes is None else [cut_branches(piece, nodes) for piece in pieces]


def cut_branches(window: Window, nodes: int) -> Window:
    """The window as if no more than ``nodes`` tokens had been drafted: what was rejected later was not drafted."""
    return replace(window, branches=tuple(_cut(b, nodes) for b in window.branches if b.accepted_prefix < nodes))


def _cut(branch: Branch, nodes: int) -> Branch:
    return replace(
        branch,
        tokens=branch.tokens[:nodes],
        draft_logprobs=branch.draft_logprobs[:nodes],
        teacher=branch.teacher[:nodes],
    )
