"""Sampling of the traffic: a share of the requests is traced, and of their features as many as a byte budget allows.

The budget is a token bucket. While it suffices, a chunk is sent at once. Otherwise chunks wait in a queue, and the
budget goes to the most informative one: the chunk of whose answer the draft predicted the smallest share. A chunk that
waits too long leaves the queue, and so does the least informative chunk of a full queue; they are sent without their
features. No verify step is dropped for the budget, so acceptance is measured over all of them. The unit is the chunk,
not the request: each chunk becomes table rows by itself, so a request may keep the features of its hard part and lose
those of its easy one.

Chunks without features are paid from the bucket too, which may owe up to one burst for them: over any t seconds at most
``rate * t + 2 * burst`` bytes are published, and the bytes that ``BudgetQueue.pay`` returns.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from schemas.hash_sampling import hash_ratio
from schemas.settings import Kafka, Traces
from schemas.trace.record import Chunk

BURST_S = 2.0
"""The bucket holds the budget of this many seconds, and at least one whole chunk."""
MAX_WAIT_S = 10.0
"""How long a chunk may wait for the budget."""


def is_sampled(request: str, ratio: float) -> bool:
    """Return whether a request is traced: drawn by its id, so that it is traced whole or not at all.

    The hash differs from the one that selects the trainer's held-out set: otherwise both would take the same requests.
    """
    return hash_ratio(request, "aurora-sample") < ratio


def predicted_share(chunk: Chunk) -> float:
    """Return the share of a chunk's answer that the draft predicted: accepted of committed tokens, over verify steps.

    A verify step without a draft predicts nothing, since drafting stops where it does not pay. A chunk without verify
    steps is part of a prompt and gives one training sample at most: it counts as fully predicted.
    """
    verified = [step for step in chunk.verify_steps if step.verify_step > 0]
    if not verified:
        return 1.0
    return sum(len(step.accepted) for step in verified) / sum(len(step.tokens) for step in verified)


class TokenBucket:
    """Bytes that may be published, on the caller's clock. It starts full, and may owe as much as it holds."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._updated_at: float | None = None

    def affords(self, size: int, now: float) -> bool:
        """Return whether the bucket holds ``size`` bytes; a full bucket affords any size."""
        if self._updated_at is not None:
            self._level = min(self._burst, self._level + self._rate * max(0.0, now - self._updated_at))
        self._updated_at = now
        return 0 < min(size, self._burst) <= self._level

    def pay(self, size: int) -> int:
        """Take published bytes. Return how many of them the bucket neither holds nor may owe."""
        level = self._level - size
        self._level = max(level, -self._burst)
        return math.ceil(self._level - level)


@dataclass(frozen=True, slots=True)
class _QueuedChunk:
    """A chunk that waits for the budget."""

    chunk: Chunk
    size: int
    """Upper bound of its published size."""
    since: float


class _Priority(NamedTuple):
    """Order of the queue: the smallest predicted share first, then the oldest."""

    predicted: float
    number: int


class BudgetQueue:
    """Chunks that wait for the budget, the most informative one first.

    Args:
        bucket: The budget.
        limit: Bytes that may wait.
        max_wait_s: How long a chunk may wait.
    """

    def __init__(self, bucket: TokenBucket, limit: int, max_wait_s: float = MAX_WAIT_S) -> None:
        self._bucket = bucket
        self._limit = limit
        self._max_wait_s = max_wait_s
        self._chunks: dict[_Priority, _QueuedChunk] = {}
        self._order: list[_Priority] = []
        self._arrivals: deque[_Priority] = deque()
        self._number = 0
        self._bytes = 0

    @classmethod
    def create(cls, kafka: Kafka, traces: Traces) -> BudgetQueue:
        """Return the queue for the budget of ``traces.max_bytes_per_second``.

        It takes half of the publisher's queue. The other half is for new rows: otherwise all of them would be dropped,
        however informative.
        """
        largest = kafka.max_message_bytes + (traces.claim_check_max_bytes if traces.features == "claim-check" else 0)
        burst = max(traces.max_bytes_per_second * BURST_S, largest)
        return cls(TokenBucket(traces.max_bytes_per_second, burst), traces.max_queue_bytes // 2)

    def push(self, chunk: Chunk, size: int, now: float) -> None:
        """Queue a chunk of at most ``size`` bytes."""
        self._number += 1
        priority = _Priority(predicted_share(chunk), self._number)
        self._chunks[priority] = _QueuedChunk(chunk, size, now)
        self._bytes += size
        self._arrivals.append(priority)
        insort(self._order, priority)

    def pop(self, now: float) -> Chunk | None:
        """Remove and return the first chunk, if the budget affords it. Call ``pay`` when it is published."""
        if not self._order or not self._bucket.affords(self._chunks[self._order[0]].size, now):
            return None
        return self._remove(self._order[0]).chunk

    def pay(self, size: int) -> int:
        """Take the published size of a chunk from the budget. Return how many bytes exceed it."""
        return self._bucket.pay(size)

    def evict(self, now: float) -> list[Chunk]:
        """Remove the chunks that waited too long; then the least informative ones, down to the queue's limit."""
        evicted = []
        while self._arrivals:
            oldest = self._chunks.get(self._arrivals[0])
            if oldest is not None and now < oldest.since + self._max_wait_s:
                break
            priority = self._arrivals.popleft()
            if oldest is not None:
                evicted.append(self._remove(priority).chunk)
        while self._bytes > self._limit:
            evicted.append(self._remove(self._order[-1]).chunk)
        return evicted

    def clear(self) -> list[Chunk]:
        """Remove all chunks, the most informative one first."""
        return [self._remove(priority).chunk for priority in list(self._order)]

    def _remove(self, priority: _Priority) -> _QueuedChunk:
        queued = self._chunks.pop(priority)
        del self._order[bisect_left(self._order, priority)]
        self._bytes -= queued.size
        return queued
