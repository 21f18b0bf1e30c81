"""The learning curve of a prequential run over the tokens of traffic, and its summary figures. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from trainer.replay.prequential import BatchScore

CURVE_WINDOW = 6_000
"""Tokens of traffic over which a value of a curve is taken."""

FINAL_TOKENS = 10_000
"""Tokens at the end of a stream over which the final acceptance is taken."""


class CurveValue(NamedTuple):
    """A value of a learning curve."""

    tokens: int
    """Tokens of traffic so far, prompts included."""
    accepted_per_step: float
    """Accepted tokens per verify step, bonus token excluded."""


def learning_curve(
    scores: Sequence[BatchScore], window: int = CURVE_WINDOW, label: str | None = None
) -> list[CurveValue]:
    """Return the accepted tokens per step over the last ``window`` tokens, at every score; of one label if given."""
    ends = list(accumulate(score.tokens for score in scores))
    values, first = [], 0
    accepted, positions = 0.0, 0.0
    for end, score in zip(ends, scores, strict=True):
        counted = label is None or score.label == label
        if counted:
            accepted, positions = accepted + score.accepted, positions + score.positions
        while ends[first] <= end - window:
            if label is None or scores[first].label == label:
                accepted, positions = accepted - scores[first].accepted, positions - scores[first].positions
            first += 1
        if counted:
            values.append(CurveValue(end, accepted / max(positions, 1)))
    return values


def tokens_to_level(curve: Iterable[CurveValue], level: float) -> int | None:
    """Return the tokens of traffic until the curve reaches a level; None if it never does."""
    return next((value.tokens for value in curve if value.accepted_per_step >= level), None)


def mean_accepted_per_step(scores: Iterable[BatchScore]) -> float:
    """Return the accepted tokens per step over all scores."""
    scores = list(scores)
    return sum(score.accepted for score in scores) / max(sum(score.positions for score in scores), 1)


def final_accepted_per_step(scores: Sequence[BatchScore]) -> float:
    """Return the accepted tokens per step over the last ``FINAL_TOKENS`` tokens."""
    return mean_accepted_per_step(last_scores(scores, FINAL_TOKENS))


def first_scores(scores: Sequence[BatchScore], tokens: int) -> list[BatchScore]:
    """Return the scores of the first so many tokens."""
    ends = accumulate(score.tokens for score in scores)
    return [score for end, score in zip(ends, scores, strict=True) if end - score.tokens < tokens]


def last_scores(scores: Sequence[BatchScore], tokens: int) -> list[BatchScore]:
    """Return the scores of the last so many tokens, newest first."""
    return first_scores(scores[::-1], tokens)
