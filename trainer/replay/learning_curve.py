"""The curve of a course over the tokens of traffic, and what it comes to. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from trainer.replay.prequential import Point

OVER = 6_000
"""Tokens of traffic that a value of a curve is taken over: those up to there."""

FINAL = 10_000
"""Tokens at the end of a stream that the final accepted tokens per step is taken over."""


class Value(NamedTuple):
    """A value of a curve."""

    tokens: int
    """Of traffic so far, prompts included."""
    length: float


def curve(points: Sequence[Point], over: int = OVER, domain: str | None = None) -> list[Value]:
    """Behind every point, the accepted tokens per step over the last ``over`` tokens of traffic, or of one domain
    among them.
    """
    ends = list(accumulate(point.tokens for point in points))
    values, first = [], 0
    accepted = positions = 0
    for end, point in zip(ends, points, strict=True):
        counted = domain is None or point.domain == domain
        if counted:
            accepted, positions = accepted + point.accepted, positions + point.positions
        while ends[first] <= end - over:
            if domain is None or points[first].domain == domain:
                accepted, positions = accepted - points[first].accepted, positions - points[first].positions
            first += 1
        if counted:
            values.append(Value(end, accepted / max(positions, 1)))
    return values


def tokens_to(values: Iterable[Value], level: float) -> int | None:
    """Tokens of traffic until the curve is at a level; None where it never is."""
    return next((value.tokens for value in values if value.length >= level), None)


def length(points: Iterable[Point]) -> float:
    """Accepted tokens per step over all the points."""
    points = list(points)
    return sum(point.accepted for point in points) / max(sum(point.positions for point in points), 1)


def final(points: Sequence[Point]) -> float:
    """Accepted tokens per step over the last ``FINAL`` tokens."""
    return length(last(points, FINAL))


def first(points: Sequence[Point], tokens: int) -> list[Point]:
    """The points of the first so many tokens."""
    ends = accumulate(point.tokens for point in points)
    return [point for end, point in zip(ends, points, strict=True) if end - point.tokens < tokens]


def last(points: Sequence[Point], tokens: int) -> list[Point]:
    """Those of the last ones, the newest first."""
    return first(points[::-1], tokens)
