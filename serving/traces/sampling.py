"""How much of the traffic is traced: a share of the requests, and of their traces what a budget of bytes can pay.

The budget is a token bucket: over any t seconds at most ``rate * t + burst`` bytes are published. While it can pay, a
chunk is sent at once. While it cannot, chunks wait in a room, and what the bucket earns goes to the one that teaches
most: that of whose answer the draft foresaw the smallest share. A chunk that was not paid for in time is given up, and
where the room is full, the one that teaches least. Chunks are decided on, not requests: each becomes rows of the tables
by itself, so a request may keep its hard part and lose its easy one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from schemas.hash_sampling import fixed_chance
from schemas.trace.record import Chunk

BURST_S = 2.0
"""The budget of this many seconds may be saved up, and at least one whole chunk."""
PATIENCE_S = 10.0
"""How long a chunk may wait for its share of the budget."""


def is_sampled(request: str, share: float) -> bool:
    """Whether a request is among the share that is traced: drawn by its id, so that it is traced whole or not at all.

    The trainer holds requests back by another hash: by the same one, both would take the same requests.
    """
    return fixed_chance(request, "aurora-sample") < share


def foreseen(chunk: Chunk) -> float:
    """Share of a chunk's answer that the draft foresaw: accepted tokens of all that its verify steps committed.

    A verify step without a draft foresaw nothing, since drafting stops where it does not pay. A chunk without verify
    steps
    is part of a prompt and gives one training row at most: it counts as foreseen whole.
    """
    verified = [r for r in chunk.verify_steps if r.verify_step > 0]
    if not verified:
        return 1.0
    return sum(len(r.accepted) for r in verified) / sum(len(r.tokens) for r in verified)


class TokenBucket:
    """Bytes that may be published, over a clock that the caller reads. It begins full."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._at: float | None = None

    def affords(self, size: int, now: float) -> bool:
        """Whether ``size`` bytes can be paid; for what is larger than the burst a full bucket must do."""
        if self._at is not None:
            self._level = min(self._burst, self._level + self._rate * max(0.0, now - self._at))
        self._at = now
        return 0 < min(size, self._burst) <= self._level

    def pay(self, size: int) -> None:
        """Take bytes that ``affords`` has granted, or fewer."""
        self._level -= size


@dataclass(frozen=True, slots=True)
class Waiting:
    """A chunk that waits to be paid."""

    chunk: Chunk
    size: int
    """Upper bound of what it weighs when it is published."""
    since: float


class _Place(NamedTuple):
    """Before those of which more was foreseen, and before those that came later."""

    foreseen: float
    number: int


class WaitingRoom:
    """Chunks that a budget has not paid for yet, the one that teaches most in front.

    Args:
        bucket: The budget.
        limit: Bytes that may wait.
        patience_s: For how long they may.
    """

    def __init__(self, bucket: TokenBucket, limit: int, patience_s: float = PATIENCE_S) -> None:
        self._bucket = bucket
        self._limit = limit
        self._patience_s = patience_s
        self._inside: dict[_Place, Waiting] = {}
        self._order: list[_Place] = []
        self._arrivals: deque[_Place] = deque()
        self._number = 0
        self._bytes = 0

    def enter(self, chunk: Chunk, size: int, now: float) -> None:
        """Take in a chunk of at most ``size`` bytes."""
        self._number += 1
        place = _Place(foreseen(chunk), self._number)
        self._inside[place] = Waiting(chunk, size, now)
        self._bytes += size
        self._arrivals.append(place)
        insort(self._order, place)

    def next(self, now: float) -> Chunk | None:
        """Let the first one out, if the budget can pay for it; ``pay`` follows when it is published."""
        if not self._order or not self._bucket.affords(self._inside[self._order[0]].size, now):
            return None
        return self._remove(self._order[0]).chunk

    def pay(self, size: int) -> None:
        """Take from the budget what a chunk from ``next`` weighed."""
        self._bucket.pay(size)

    def expel(self, now: float) -> list[Chunk]:
        """Let out those that waited too long, then, while too much waits, those that teach least."""
        gone = []
        while self._arrivals:
            oldest = self._inside.get(self._arrivals[0])
            if oldest is not None and now < oldest.since + self._patience_s:
                break
            place = self._arrivals.popleft()
            if oldest is not None:
                gone.append(self._remove(place).chunk)
        while self._bytes > self._limit:
            gone.append(self._remove(self._order[-1]).chunk)
        return gone

    def clear(self) -> list[Chunk]:
        """Let everything out, the one that teaches most first."""
        return [self._remove(place).chunk for place in list(self._order)]

    def _remove(self, place: _Place) -> Waiting:
        waiting = self._inside.pop(place)
        del self._order[bisect_left(self._order, place)]
        self._bytes -= waiting.size
        return waiting
