"""Accounting of trace rows: every captured row is published, dropped for a reason, or pending."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from schemas.telemetry.metrics import counts_by

DropReason = Literal[
    "queue_full",
    "trainer_lag",
    "circuit_breaker_open",
    "offload_failed",
    "too_large",
    "unencodable",
    "rejected",
    "closed",
    "unconfirmed",
]


@dataclass(frozen=True, slots=True)
class TraceCounts:
    """Rows since the start. ``captured`` = ``published`` + the sum of ``dropped`` + ``pending``, at any time."""

    captured: int
    published: int
    dropped: dict[str, int]
    pending: int
    pending_bytes: int
    sampled: int = 0
    """Requests in the sample."""
    unsampled: int = 0
    """Requests outside the sample; none of their rows is captured."""
    without_features: int = 0
    """Captured rows whose features were dropped for the byte budget."""
    bytes_over_budget: int = 0
    """Bytes that were published although the byte budget did not suffice."""

    @property
    def rows_dropped(self) -> int:
        """Rows dropped for any reason."""
        return sum(self.dropped.values())

    def metrics(self) -> Iterator[Metric]:
        """Yield the counts as metrics."""
        yield CounterMetricFamily("aurora_serve_trace_rows_captured", "Trace rows captured.", value=self.captured)
        yield CounterMetricFamily("aurora_serve_trace_rows_published", "Trace rows acknowledged.", value=self.published)
        yield counts_by(
            "aurora_serve_trace_rows_dropped",
            "Trace rows dropped, by reason.",
            "reason",
            get_args(DropReason),
            self.dropped,
        )
        yield GaugeMetricFamily("aurora_serve_trace_rows_pending", "Trace rows not yet published.", value=self.pending)
        yield GaugeMetricFamily(
            "aurora_serve_trace_queue_bytes", "Bytes of the pending rows.", value=self.pending_bytes
        )
        yield CounterMetricFamily(
            "aurora_serve_trace_rows_without_features",
            "Trace rows whose features were dropped for traces.max_bytes_per_second.",
            value=self.without_features,
        )
        yield CounterMetricFamily(
            "aurora_serve_trace_over_budget_bytes",
            "Trace bytes beyond traces.max_bytes_per_second, of rows without features.",
            value=self.bytes_over_budget,
        )
        yield CounterMetricFamily(
            "aurora_serve_trace_requests_sampled",
            "Requests in the sample: their rows are captured.",
            value=self.sampled,
        )
        yield CounterMetricFamily(
            "aurora_serve_trace_requests_unsampled", "Requests outside the sample.", value=self.unsampled
        )


class TraceAccounting:
    """Counts of rows, for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._captured = 0
        self._published = 0
        self._dropped: Counter[str] = Counter()
        self._pending = 0
        self._bytes = 0
        self._sampled = self._unsampled = 0
        self._without_features = 0
        self._bytes_over_budget = 0

    def count_request(self, *, sampled: bool) -> None:
        """Count a request in the sample, or outside it."""
        with self._lock:
            self._sampled += sampled
            self._unsampled += not sampled

    def capture(self, rows: int, size: int, limit: int) -> bool:
        """Count rows as pending, or as dropped if ``size`` more bytes exceed ``limit``."""
        with self._lock:
            self._captured += rows
            if self._bytes + size > limit:
                self._dropped["queue_full"] += rows
                return False
            self._pending += rows
            self._bytes += size
            return True

    def reject(self, rows: int, reason: DropReason) -> None:
        """Count rows as dropped that never became pending."""
        with self._lock:
            self._captured += rows
            self._dropped[reason] += rows

    def drop_features(self, rows: int, size: int) -> None:
        """Count pending rows that have lost their features of ``size`` bytes."""
        with self._lock:
            self._bytes -= size
            self._without_features += rows

    def exceed_budget(self, size: int) -> None:
        """Count bytes that were published beyond the budget."""
        with self._lock:
            self._bytes_over_budget += size

    def publish(self, rows: int, size: int) -> None:
        """Count pending rows as published."""
        with self._lock:
            self._pending -= rows
            self._bytes -= size
            self._published += rows

    def drop(self, rows: int, size: int, reason: DropReason) -> None:
        """Count pending rows as dropped."""
        with self._lock:
            self._pending -= rows
            self._bytes -= size
            self._dropped[reason] += rows

    def counts(self) -> TraceCounts:
        """Return all counts of one moment."""
        with self._lock:
            dropped = dict(self._dropped)
            return TraceCounts(
                self._captured,
                self._published,
                dropped,
                self._pending,
                self._bytes,
                sampled=self._sampled,
                unsampled=self._unsampled,
                without_features=self._without_features,
                bytes_over_budget=self._bytes_over_budget,
            )
