"""Where every captured trace row is: published, shed for a reason, or pending."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import Literal

Reason = Literal[
    "queue_full",
    "budget",
    "breaker_open",
    "claim_failed",
    "too_large",
    "unencodable",
    "refused",
    "closed",
    "unconfirmed",
]


@dataclass(frozen=True, slots=True)
class TraceCounts:
    """Rows since the start. ``captured`` = ``published`` + the sum of ``shed`` + ``pending``, at any time."""

    captured: int
    published: int
    shed: dict[str, int]
    pending: int
    pending_bytes: int
    sampled_out: int = 0
    """Requests outside the traced share; nothing of them is captured."""

    @property
    def rows_shed(self) -> int:
        """Rows shed for any reason."""
        return sum(self.shed.values())


class Ledger:
    """Where every captured row is, for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._captured = 0
        self._published = 0
        self._shed: Counter[str] = Counter()
        self._pending = 0
        self._bytes = 0
        self._sampled_out = 0

    def sample_out(self) -> None:
        """Count a request of which nothing will be captured."""
        with self._lock:
            self._sampled_out += 1

    def capture(self, rows: int, size: int, limit: int) -> bool:
        """Count rows as pending, or as shed where ``size`` more bytes would go beyond ``limit``."""
        with self._lock:
            self._captured += rows
            if self._bytes + size > limit:
                self._shed["queue_full"] += rows
                return False
            self._pending += rows
            self._bytes += size
            return True

    def turn_away(self, rows: int, reason: Reason) -> None:
        """Count rows that never became pending."""
        with self._lock:
            self._captured += rows
            self._shed[reason] += rows

    def publish(self, rows: int, size: int) -> None:
        """Pending rows reached the broker."""
        with self._lock:
            self._pending -= rows
            self._bytes -= size
            self._published += rows

    def shed(self, rows: int, size: int, reason: Reason) -> None:
        """Pending rows were given up."""
        with self._lock:
            self._pending -= rows
            self._bytes -= size
            self._shed[reason] += rows

    def counts(self) -> TraceCounts:
        """All figures of one moment."""
        with self._lock:
            shed = dict(self._shed)
            return TraceCounts(
                self._captured, self._published, shed, self._pending, self._bytes, sampled_out=self._sampled_out
            )
