"""Metrics of a plugin, and the limit of the time that its capture may take from the server.

The server exports metrics on its own ``/metrics`` and collects them from files that each of its processes writes. So
they are plain counters, not a collector, and they are created on first use, in the process that runs the steps: SGLang
sets the folder of these files only after the plugins were loaded.
"""

from __future__ import annotations

import threading
from collections import Counter as Counts
from typing import Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from serving.answers.answer_counts import AnswerCounts
from serving.traces.accounting import TraceCounts

WINDOW_S = 2.0
"""Busy time of the steps after which the ratio is adjusted."""
IDLE_S = 1.0
"""A longer time between two steps counts as idle."""
MIN_REQUEST_RATIO = 1 / 256
"""Smallest ratio: without any recorded request the cost could not be measured again."""

_DURATIONS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)


class PluginMetrics:
    """Counters since the start of the process.

    Args:
        server: Middle part of the names: ``sglang`` or ``vllm``.
        registry: For the counters.
    """

    def __init__(self, server: str, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, mode: Literal["livemax", "livemin"]) -> Gauge:
            return Gauge(name, text, multiprocess_mode=mode, registry=registry)

        self.hook_errors = counter(f"aurora_{server}_hook_errors", "Hooks that failed; the server continued.", "hook")
        self.untraced = counter(
            f"aurora_{server}_requests_untraced", "Requests that are not traced, or only in part.", "reason"
        )
        self.steps_dropped = counter(
            f"aurora_{server}_verify_steps_dropped", "Verify steps that were not recorded.", "reason"
        )
        self.cached = counter(
            f"aurora_{server}_prompt_tokens_cached", "Prompt tokens from the prefix cache, which have no hidden states."
        )
        self.hook_duration = Histogram(
            f"aurora_{server}_hook_duration_seconds",
            "Time of the hooks in a step.",
            buckets=_DURATIONS_S,
            registry=registry,
        )
        self.time_ratio = gauge(
            f"aurora_{server}_capture_time_ratio", "Share of the steps' time that the capture takes.", "livemax"
        )
        self.request_ratio = gauge(
            f"aurora_{server}_capture_request_ratio", "Share of the requests that the limit lets be traced.", "livemin"
        )
        self.circuit_breaker_open = gauge(
            f"aurora_{server}_trace_circuit_breaker_open",
            "1 while the circuit breaker of the broker is not closed.",
            "livemax",
        )
        self._captured = counter("aurora_serve_trace_rows_captured", "Trace rows captured.")
        self._published = counter("aurora_serve_trace_rows_published", "Trace rows acknowledged.")
        self._dropped = counter("aurora_serve_trace_rows_dropped", "Trace rows dropped, by reason.", "reason")
        self._without_features = counter(
            "aurora_serve_trace_rows_without_features",
            "Trace rows whose features were dropped for traces.max_bytes_per_second.",
        )
        self._over_budget = counter(
            "aurora_serve_trace_over_budget_bytes",
            "Trace bytes beyond traces.max_bytes_per_second, of rows without features.",
        )
        self._unsampled = counter("aurora_serve_trace_requests_unsampled", "Requests outside the sample.")
        self._answers = counter("aurora_serve_answers_published", "Answers published.")
        self._unpublished = counter("aurora_serve_answers_not_published", "Answers not published, by reason.", "reason")
        self._exported: Counts[str] = Counts()

    def update(self, counts: TraceCounts, answers: AnswerCounts | None) -> None:
        """Raise the counters of rows and answers to the publishers' counts."""
        self._raise(self._captured, "captured", counts.captured)
        self._raise(self._published, "published", counts.published)
        self._raise(self._unsampled, "unsampled", counts.unsampled)
        self._raise(self._without_features, "without features", counts.without_features)
        self._raise(self._over_budget, "over budget", counts.bytes_over_budget)
        for reason, rows in counts.dropped.items():
            self._raise(self._dropped.labels(reason), f"dropped {reason}", rows)
        if answers is not None:
            self._raise(self._answers, "answers", answers.done)
            for reason, count in answers.dropped.items():
                self._raise(self._unpublished.labels(reason), f"answers {reason}", count)

    def _raise(self, counter: Counter, name: str, value: int) -> None:
        counter.inc(value - self._exported[name])
        self._exported[name] = value


def adjust_ratio(ratio: float, cost_s: float, busy_s: float, limit: float) -> float:
    """Return the share of the requests to record from now on.

    Args:
        ratio: Share until now.
        cost_s: Time that the capture took.
        busy_s: Time of the steps meanwhile.
        limit: Maximum share of the steps' time.
    """
    spent = cost_s / busy_s
    if spent > limit:
        return max(MIN_REQUEST_RATIO, ratio * limit / spent)
    # The ratio grows only below half of the limit, so that it does not oscillate.
    return min(1.0, ratio * 1.25) if spent < limit / 2 else ratio


class CaptureLimit:
    """Measures the time of the capture, and limits the requests that are recorded; for any thread.

    Args:
        limit: Maximum share of the steps' time (``max_capture_ratio``).
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._cost_s = self._busy_s = 0.0
        self._last_step: float | None = None
        self.request_ratio = 1.0
        """Share of the requests to record now."""
        self.time_ratio = 0.0
        """Share of the steps' time that the capture took in the last window."""

    def add_cost(self, seconds: float) -> None:
        """Add time that the capture took from the server: from its thread, or from the interpreter."""
        with self._lock:
            self._cost_s += seconds

    def start_step(self, now: float) -> None:
        """Count a step that starts now, in monotonic seconds."""
        with self._lock:
            if self._last_step is not None and now - self._last_step < IDLE_S:
                self._busy_s += now - self._last_step
            self._last_step = now
            if self._busy_s >= WINDOW_S:
                self.request_ratio = adjust_ratio(self.request_ratio, self._cost_s, self._busy_s, self._limit)
                self.time_ratio = self._cost_s / self._busy_s
                self._cost_s = self._busy_s = 0.0
