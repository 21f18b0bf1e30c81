"""The learners of all ranks as one: what rank 0 does with its own, it has the others do with theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from schemas.speculator.network import EagleDraft
from trainer.data.samples import Batch, Window, collate
from trainer.loop.distributed import Alone, Together
from trainer.loop.learner import Learner
from trainer.objective.losses import Loss

Order = Callable[[Learner], object] | None
"""What every rank does next; None ends it."""


@dataclass(frozen=True, slots=True)
class Work:
    """The windows of one step, ready to be learned from: the parts of each rank."""

    shares: tuple[tuple[Batch, ...], ...]
    consumed: int
    """Tokens with features, over all ranks."""
    newest: float
    """Unix time of the newest window among them; 0 where it is not known."""
    requests: tuple[str, ...] = ()
    """Whose windows they are, each once."""


@dataclass(frozen=True, slots=True)
class Restore:
    """Take a state."""

    tensors: Mapping[str, Tensor]
    steps: int

    def __call__(self, learner: Learner) -> None:
        """Do it."""
        learner.restore(self.tensors, self.steps)


@dataclass(frozen=True, slots=True)
class Adopt:
    """Take weights."""

    weights: Mapping[str, Tensor]

    def __call__(self, learner: Learner) -> None:
        """Do it."""
        learner.adopt(self.weights)


def work_of(windows: Sequence[Window], ranks: int, parts: int) -> Work:
    """A step's windows over ranks and parts; where they are too few, some get one that teaches nothing."""
    parts = min(parts, len(windows[::ranks]))
    silent = [_silenced(windows[0])]
    shares = tuple(
        tuple(collate(windows[rank::ranks][part::parts] or silent) for part in range(parts)) for rank in range(ranks)
    )
    consumed, newest = sum(len(window) for window in windows), max(window.time for window in windows)
    return Work(shares, consumed, newest, tuple(dict.fromkeys(window.request for window in windows)))


class Team:
    """What the trainer drives; alone it is the learner itself."""

    def __init__(self, learner: Learner, ranks: Alone | Together) -> None:
        self.learner = learner
        self._ranks = ranks

    def step(self, work: Work) -> Loss:
        """As ``Learner.step``, over the shares of all ranks."""
        self._tell(take_share)
        return _learn(self.learner, _shared(work.shares) if isinstance(self._ranks, Together) else work.shares[0])

    def weights(self) -> EagleDraft:
        """As ``Learner.weights``."""
        self._tell(Learner.weights)
        return self.learner.weights()

    def tensors(self) -> dict[str, Tensor]:
        """As ``Learner.tensors``."""
        self._tell(Learner.tensors)
        return self.learner.tensors()

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """As ``Learner.restore``."""
        self._tell(order := Restore(tensors, steps))
        order(self.learner)

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """As ``Learner.adopt``."""
        self._tell(order := Adopt(weights))
        order(self.learner)

    def rest(self) -> None:
        """Let the others know that nothing is wrong while there is nothing to do: gloo gives up after half an hour."""
        self._tell(nothing)

    def close(self) -> None:
        """Let the others end."""
        self._tell(None)

    def _tell(self, order: Order) -> None:
        if isinstance(self._ranks, Together):
            self._ranks.tell(order)


def follow(learner: Learner, ranks: Together) -> None:
    """Do what rank 0 says until it ends."""
    while (order := ranks.told()) is not None:
        order(learner)


def take_share(learner: Learner) -> Loss:
    """Learn from the share that rank 0 gives."""
    return _learn(learner, _shared(None))


def nothing(_: Learner) -> None:
    """Wait for the next order."""


def _learn(learner: Learner, parts: Sequence[Batch]) -> Loss:
    return learner.step(*parts)


def _shared(shares: Sequence[Sequence[Batch]] | None) -> Sequence[Batch]:
    """This rank's share of what rank 0 has."""
    own: list[Sequence[Batch]] = [()]
    dist.scatter_object_list(own, list(shares) if shares else None)
    return own[0]


def _silenced(window: Window) -> Window:
    return replace(window, known=torch.zeros_like(window.known), teacher=window.teacher[:0], branches=())
