"""Runs the sampled acceptance rule over every random outcome instead of drawing one.

The rule's thresholds determine the probability of each outcome: a uniform number follows both results of a comparison
and takes the probability from its bound. The result is the exact distribution of the real function.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar
from unittest import mock

import torch
from torch import Tensor

from schemas.speculator import acceptance
from schemas.speculator.acceptance import Verdict, accept_sampled

Outcome = TypeVar("Outcome", bound=Hashable)


class Chance:
    """Follows one path of decisions and multiplies their probabilities; impossible outcomes are no options."""

    def __init__(self, decisions: Sequence[int]) -> None:
        self._ahead = list(decisions)
        self.taken: list[int] = []
        self.options: list[int] = []
        self.probability = 1.0

    def decide(self, chances: Sequence[float]) -> int:
        possible = [i for i, chance in enumerate(chances) if chance > 0]
        option = self._ahead[len(self.taken)] if len(self.taken) < len(self._ahead) else 0
        self.taken.append(option)
        self.options.append(len(possible))
        self.probability *= chances[possible[option]]
        return possible[option]

    def draw(self, probs_V: Tensor, generator: object = None) -> int:
        return self.decide(probs_V.tolist())


class _Uniform:
    """A number from [0, 1) that is not drawn until it is compared."""

    def __init__(self, chance: Chance, scale: float = 1.0) -> None:
        self._chance, self._scale = chance, scale

    def __mul__(self, scale: Tensor | float) -> _Uniform:
        return _Uniform(self._chance, self._scale * float(scale))

    def __lt__(self, bound: Tensor) -> bool:
        below = min(1.0, float(bound) / self._scale)
        return self._chance.decide([below, 1 - below]) == 0


def accept_with(
    chance: Chance, tokens: Sequence[int], parents: Sequence[int], p_mV: Tensor, q_mV: Tensor | None = None
) -> Verdict:
    """``accept_sampled`` with its randomness taken from ``chance``."""
    with (
        mock.patch.object(acceptance, "draw_token", chance.draw),
        mock.patch.object(torch, "rand", return_value=_Uniform(chance)),
    ):
        return accept_sampled(tokens, parents, p_mV, None, q_mV)


def distribution(run: Callable[[Chance], Outcome]) -> dict[Outcome, float]:
    """Every outcome of ``run`` with its probability."""
    found: dict[Outcome, float] = defaultdict(float)
    decisions: list[int] = []
    while True:
        chance = Chance(decisions)
        found[run(chance)] += chance.probability
        decisions = chance.taken
        while decisions and decisions[-1] + 1 == chance.options[len(decisions) - 1]:
            decisions.pop()
        if not decisions:
            return dict(found)
        decisions[-1] += 1
