"""What a run says: its curve over the tokens of traffic, and the few numbers that it is summed up in. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

from ops.bench.learning.prequential import Learned
from trainer.replay.learning_curve import OVER, Value, curve, first, last, length, tokens_to
from trainer.replay.prequential import Point

OVER_BY_DOMAIN = 16_000
"""The same for one domain of a mixed stream, of which it is a fourth."""

AFTER_SHIFT = 2_000
"""Tokens after a shift that its drop, and its recovery, are taken over."""

RECOVERED = 0.9
"""Share of the level before a shift at which the draft counts as back."""

LEVELS = (0.5, 1.0, 1.5)


@dataclass(frozen=True, slots=True)
class Shift:
    """What happened when a domain ended and another began."""

    domain: str
    """The new one."""
    before: float
    """Accepted tokens per step over the last ``OVER`` tokens of the domain before."""
    after: float
    """Over the first ``AFTER_SHIFT`` tokens of the new one."""
    recovered_after: int | None
    """Tokens of the new domain until the last ``AFTER_SHIFT`` of them are at ``RECOVERED`` of the level before; None
    where they never are."""
    settled_after: int | None
    """The same, for the level that the new domain itself has over its last ``OVER`` tokens."""
    over_static: float
    """Tokens of a verify step over those with the draft that was frozen when the first domain ended, over the new
    domain;
    a verify step gives the accepted tokens and one more."""

    @property
    def drop(self) -> float:
        """By how much the accepted tokens per step fell."""
        return self.before - self.after


def static_curve(points: Sequence[Point], over: int = OVER) -> list[Value]:
    """The same for the frozen draft, from where it is scored."""
    start = next((i for i, point in enumerate(points) if point.static_accepted is not None), len(points))
    offset = sum(point.tokens for point in points[:start])
    frozen = [point._replace(accepted=point.static_accepted or 0) for point in points[start:]]
    return [Value(offset + value.tokens, value.length) for value in curve(frozen, over)]


def length_at(values: Iterable[Value], tokens: int) -> float | None:
    """The curve behind the batch with which there are so many tokens; None where the stream ends before."""
    return next((value.length for value in values if value.tokens >= tokens), None)


def answered_within(points: Iterable[Point], tokens: int) -> int:
    """Those of the first so many tokens of traffic that the target answered; the rest are prompts."""
    points = list(points)
    ends = accumulate(point.tokens for point in points)
    return sum(point.answered for end, point in zip(ends, points, strict=True) if end <= tokens)


def shifts(points: Sequence[Point]) -> list[Shift]:
    """Every change of domain of an ordered stream."""
    stretches = [(domain, list(group)) for domain, group in groupby(points, key=lambda point: point.domain)]
    found = []
    for (_, ended), (domain, begun) in pairwise(stretches):
        before, own = length(last(ended, OVER)), length(last(begun, OVER))
        # A short stretch at the beginning says nothing yet: it counts from where it is as long as all later ones.
        rolling = [value for value in curve(begun, AFTER_SHIFT) if value.tokens >= AFTER_SHIFT]
        found.append(
            Shift(
                domain,
                before,
                after=length(first(begun, AFTER_SHIFT)),
                recovered_after=tokens_to(rolling, RECOVERED * before),
                settled_after=tokens_to(rolling, RECOVERED * own),
                over_static=over_static(begun),
            )
        )
    return found


def over_static(points: Iterable[Point]) -> float:
    """Tokens of a verify step by the draft that learns over those by the frozen one, where both are scored."""
    both = [point for point in points if point.static_accepted is not None]
    positions = sum(point.positions for point in both)
    static = sum(point.static_accepted or 0 for point in both)
    return (positions + sum(point.accepted for point in both)) / max(positions + static, 1)


def training_rate(learned: Learned) -> float:
    """Tokens learned from in a second of training, replayed ones each time."""
    return learned.trained_tokens / max(learned.training_s, 1e-9)
