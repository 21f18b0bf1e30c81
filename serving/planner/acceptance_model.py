"""How often the target accepts draft tokens, measured while the node serves.

The acceptance probability of a draft token is that of its parent times the acceptance rate of similar tokens: of the
speculator, by confidence; of the suffix drafter, by estimated probability and by the length of the match. What
the speculator adds depends on what the suffix drafter has found already, so its drafts are also measured as a whole,
next to suffix drafts of similar confidence. No I/O and no torch.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from schemas.trace.record import DraftSource

_WINDOW = 48.0
"""Outcomes that an acceptance rate remembers."""
_PRIOR_WEIGHT = 2.0
"""Outcomes that the prior of an acceptance rate counts as."""
_PROBABILITY_EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_MATCH_EDGES = (1, 3, 4, 6, 9, 16)
"""First match length of each group but the first, which is that of the speculator's tokens."""
_CONFIDENCE_EDGES = (0.05, 0.3, 0.5, 0.7, 0.85)
"""Edges of the acceptance probability of a suffix draft's first token, between which the speculator's gain differs."""


@dataclass(frozen=True, slots=True)
class DraftOutcome:
    """Which of the sibling tokens that one drafter proposed after an accepted token is the output, if any."""

    source: DraftSource
    greedy: bool
    siblings: tuple[tuple[float, int], ...]
    """Confidence and match length of each sibling."""
    accepted: int | None
    """Index of the sibling that is the output; None if it is another token."""


class SpeculatorOutcome(NamedTuple):
    """How far the two drafts of one sequence were accepted."""

    greedy: bool
    confidence: float
    """Of the suffix draft (``SequenceOutlook.confidence``)."""
    suffix_tokens: int
    """Tokens that the suffix draft alone would have had accepted."""
    speculator_tokens: int
    """Tokens that the speculator's draft alone would have had accepted."""
    drafted_depth: int
    """Depth to which the speculator could draft."""


class SpeculatorEstimate(NamedTuple):
    """What is expected of the speculator's draft for one sequence."""

    reached: Sequence[float]
    """Probability that the first 1, 2, .. tokens are accepted."""
    exceeded: float
    """Probability that an accepted token of the suffix draft lies deeper than all accepted tokens of this draft."""


class _AcceptanceRate:
    """The share of accepted tokens, exponentially weighted towards recent ones."""

    __slots__ = ("_accepted", "_total")

    def __init__(self) -> None:
        self._accepted = self._total = 0.0

    def update(self, *, accepted: bool, weight: float = 1.0) -> None:
        keep = (1 - 1 / _WINDOW) ** weight
        gained = (1 - keep) * _WINDOW
        self._total = self._total * keep + gained
        self._accepted = self._accepted * keep + gained * accepted

    def estimate(self, prior: float) -> float:
        """Return the rate; with few outcomes it stays near ``prior``."""
        return (self._accepted + prior * _PRIOR_WEIGHT) / (self._total + _PRIOR_WEIGHT)


class AcceptanceModel:
    """Acceptance rate of one drafter's tokens whose parent was accepted, by confidence and match length."""

    def __init__(self) -> None:
        self._rates = [
            [_AcceptanceRate() for _ in range(len(_PROBABILITY_EDGES) + 1)] for _ in range(len(_MATCH_EDGES) + 1)
        ]
        self._next = _AcceptanceRate()

    def update(self, outcome: DraftOutcome, weight: float = 1.0) -> None:
        """Learn from the outcome of sibling tokens."""
        self._next.update(accepted=outcome.accepted is not None, weight=weight)
        for i, (probability, match_length) in enumerate(outcome.siblings):
            self._find_rate(probability, match_length).update(accepted=i == outcome.accepted, weight=weight)

    def estimate(self, probability: float, match_length: int = 0) -> float:
        """Return the acceptance rate of similar tokens. The confidence is also the prior."""
        return self._find_rate(probability, match_length).estimate(probability)

    def estimate_next(self) -> float:
        """Return the rate at which one of the tokens drafted after an accepted token is accepted."""
        return self._next.estimate(1.0)

    def _find_rate(self, probability: float, match_length: int) -> _AcceptanceRate:
        return self._rates[bisect.bisect(_MATCH_EDGES, match_length)][bisect.bisect(_PROBABILITY_EDGES, probability)]


class SpeculatorModel:
    """Acceptance of the speculator's drafts by depth, next to suffix drafts of similar confidence."""

    def __init__(self, max_depth: int) -> None:
        groups = range(len(_CONFIDENCE_EDGES) + 1)
        self._reached = [[_AcceptanceRate() for _ in range(max_depth)] for _ in groups]
        self._exceeded = [_AcceptanceRate() for _ in groups]

    def update(self, outcome: SpeculatorOutcome, weight: float) -> None:
        """Learn from one draft."""
        group = confidence_group(outcome.confidence)
        for depth, rate in enumerate(self._reached[group][: outcome.drafted_depth], start=1):
            rate.update(accepted=depth <= outcome.speculator_tokens, weight=weight)
        if outcome.suffix_tokens:
            self._exceeded[group].update(accepted=outcome.suffix_tokens > outcome.speculator_tokens, weight=weight)

    def estimate(self, confidence: float) -> SpeculatorEstimate:
        """Return what is expected of a draft next to a suffix draft of this confidence.

        Without a suffix draft, depths that are not measured are as if every depth had the rate of the first, and the
        first is 0. The prior next to a suffix draft is the rate without one.
        """
        group, reached = confidence_group(confidence), list[float]()
        for alone, rate in zip(self._reached[0], self._reached[group], strict=True):
            above, first = (reached[-1], reached[0]) if reached else (1.0, 0.0)
            prior = alone.estimate(above * first)
            reached.append(min(rate.estimate(prior) if group else prior, above))
        return SpeculatorEstimate(reached, self._exceeded[group].estimate(1 - reached[0]))


class ChainModel:
    """Acceptance of the speculator's chains next to suffix drafts of similar confidence, where one of both is verified.

    The output shows how good the other one was only as far as it goes, and it goes further the better the verified one
    was. So a depth has the rate of those tokens alone whose parents are in the output.
    """

    def __init__(self, depth: int) -> None:
        self._rates = [[_AcceptanceRate() for _ in range(depth)] for _ in range(len(_CONFIDENCE_EDGES) + 1)]

    def update(self, confidence: float, chain: Sequence[int], output: Sequence[int], weight: float) -> None:
        """Learn from one chain and the output tokens of its verify step, whichever chain was verified."""
        for rate, token, chosen in zip(self._rates[confidence_group(confidence)], chain, output, strict=False):
            rate.update(accepted=token == chosen, weight=weight)
            if token != chosen:
                return

    def expect(self, confidence: float, depth: int) -> float:
        """Return the expected number of accepted tokens of a chain next to a suffix draft of this confidence.

        Args:
            confidence: Of the suffix draft.
            depth: Tokens of the chain.

        Returns:
            Without a suffix draft, the prior of a depth is the rate of the depth before, and that of the first is 0.
            The prior next to a suffix draft is the rate without one.
        """
        group, expected, reached, prior = confidence_group(confidence), 0.0, 1.0, 0.0
        for alone, rate in zip(self._rates[0][:depth], self._rates[group][:depth], strict=True):
            prior = alone.estimate(prior)
            reached *= rate.estimate(prior) if group else prior
            expected += reached
        return expected


def confidence_group(confidence: float) -> int:
    """Return the group of suffix drafts with a similar confidence; 0 is that without a draft."""
    return bisect.bisect(_CONFIDENCE_EDGES, confidence)
