"""Counts of answers on their way to or from the answers topic."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily

from schemas.telemetry.metrics import counts_by


@dataclass(frozen=True, slots=True)
class AnswerCounts:
    """Answers since the start."""

    done: int
    """Answers that the broker acknowledged, or that the engine was handed."""
    dropped: Mapping[str, int]
    """Answers dropped, by reason."""


class AnswerAccounting:
    """Counts of answers in one direction, for any thread.

    Args:
        stage: What is counted: answers that were published or consumed, and those that were not.
        reasons: Why an answer is dropped. Each count starts at zero.
    """

    def __init__(self, stage: Literal["published", "consumed"], reasons: Iterable[str]) -> None:
        self._stage = stage
        self._lock = threading.Lock()
        self._done = 0
        self._dropped = Counter(dict.fromkeys(reasons, 0))

    def add(self, answers: int) -> None:
        """Count answers that were published or consumed."""
        with self._lock:
            self._done += answers

    def drop(self, reason: str) -> None:
        """Count an answer that was dropped."""
        with self._lock:
            self._dropped[reason] += 1

    def counts(self) -> AnswerCounts:
        """Return all counts of one moment."""
        with self._lock:
            return AnswerCounts(self._done, dict(self._dropped))

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics at scrape time."""
        counts = self.counts()
        yield CounterMetricFamily(f"aurora_serve_answers_{self._stage}", f"Answers {self._stage}.", value=counts.done)
        name, text = f"aurora_serve_answers_not_{self._stage}", f"Answers not {self._stage}, by reason."
        yield counts_by(name, text, "reason", (), counts.dropped)
