"""Metrics of a plugin, and the limit of the time that its capture may take from the server.

The server exports metrics on its own ``/metrics`` and collects them from files that each of its processes writes. So
they are plain counters, not a collector, and they are created on first use, in the process that runs the steps: SGLang
sets the folder of these files only after the plugins were loaded.
"""

from __future__ import annotations

import threading
from collections import Counter as Counts
from collections.abc import Sequence
from typing import Literal, get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from schemas.telemetry.metrics import counter_by
from serving.answers.answer_consumer import Unconsumed
from serving.answers.answer_counts import AnswerCounts
from serving.answers.answer_publisher import Unpublished
from serving.answers.shared_corpus import SharedCorpus
from serving.engines.plugin.row_drafter import RowCounts
from serving.engines.plugin.trace_options import Untraced
from serving.traces.accounting import DropReason, TraceCounts

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
        def counter(name: str, text: str, label: str = "", values: Sequence[str] = ()) -> Counter:
            if label:
                return counter_by(name, text, label, values, registry)
            return Counter(name, text, registry=registry)

        def gauge(name: str, text: str, mode: Literal["livemax", "livemin"]) -> Gauge:
            return Gauge(name, text, multiprocess_mode=mode, registry=registry)

        self.hook_errors = counter(f"aurora_{server}_hook_errors", "Hooks that failed; the server continued.", "hook")
        self.untraced = counter(
            f"aurora_{server}_requests_untraced",
            "Requests that are not traced, or only in part.",
            "reason",
            get_args(Untraced),
        )
        self.steps_dropped = counter(
            f"aurora_{server}_verify_steps_dropped",
            "Verify steps that were not recorded.",
            "reason",
            ("queue_full", "malformed"),
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
        self._dropped = counter(
            "aurora_serve_trace_rows_dropped", "Trace rows dropped, by reason.", "reason", get_args(DropReason)
        )
        self._without_features = counter(
            "aurora_serve_trace_rows_without_features",
            "Trace rows whose features were dropped for traces.max_bytes_per_second.",
        )
        self._over_budget = counter(
            "aurora_serve_trace_over_budget_bytes",
            "Trace bytes beyond traces.max_bytes_per_second, of rows without features.",
        )
        self._sampled = counter(
            "aurora_serve_trace_requests_sampled", "Requests in the sample: their rows are captured."
        )
        self._unsampled = counter("aurora_serve_trace_requests_unsampled", "Requests outside the sample.")
        self._answers = counter("aurora_serve_answers_published", "Answers published.")
        self._unpublished = counter(
            "aurora_serve_answers_not_published",
            "Answers not published, by reason.",
            "reason",
            get_args(Unpublished),
        )
        self._exported: Counts[str] = Counts()

    def update(self, counts: TraceCounts, answers: AnswerCounts | None) -> None:
        """Raise the counters of rows and answers to the publishers' counts."""
        self._raise(self._captured, "captured", counts.captured)
        self._raise(self._published, "published", counts.published)
        self._raise(self._sampled, "sampled", counts.sampled)
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


class SuffixMetrics:
    """Counters of the suffix drafter and its corpus; the corpus stays empty where nothing is traced.

    Args:
        server: Middle part of the names of what the built-in engine does not have.
        registry: For the counters.
    """

    def __init__(self, server: str, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, registry=registry)

        self.failures = counter("aurora_serve_drafter_failures", "Failures of the suffix drafter; each turned it off.")
        self._rows = counter(
            f"aurora_{server}_suffix_rows", "Drafts whose first tokens the suffix drafter's took the place of."
        )
        self._rows_without_lookup = counter(
            f"aurora_{server}_suffix_rows_without_lookup",
            "Drafts for which the suffix drafter had no time in the step.",
        )
        self._draft_tokens = counter(
            "aurora_serve_suffix_draft_tokens", "Draft tokens that only the suffix drafter proposed."
        )
        self._accepted_tokens = counter(
            "aurora_serve_suffix_accepted_tokens", "Accepted draft tokens that only the suffix drafter proposed."
        )
        self._consumed = counter("aurora_serve_answers_consumed", "Answers consumed.")
        self._unconsumed = counter_by(
            "aurora_serve_answers_not_consumed",
            "Answers not consumed, by reason.",
            "reason",
            get_args(Unconsumed),
            registry,
        )
        self._corpus_tokens = Gauge(
            "aurora_serve_corpus_tokens", "Tokens in the corpus.", multiprocess_mode="livemax", registry=registry
        )
        self._corpus_bytes = Gauge(
            "aurora_serve_corpus_bytes", "Bytes of the corpus.", multiprocess_mode="livemax", registry=registry
        )
        self._overflowed = counter(
            "aurora_serve_corpus_overflowed", "Answers dropped before there was time to insert them into the corpus."
        )
        self._exported: Counts[str] = Counts()

    def update(self, counts: RowCounts) -> None:
        """Raise the counters of drafts to the drafter's counts."""
        self._raise(self._rows, "rows", counts.rows)
        self._raise(self._rows_without_lookup, "rows without lookup", counts.rows_without_lookup)
        self._raise(self._draft_tokens, "draft tokens", counts.draft_tokens)
        self._raise(self._accepted_tokens, "accepted tokens", counts.accepted_tokens)

    def update_corpus(self, shared: SharedCorpus) -> None:
        """Raise the counters of answers to its counts; from another thread than ``update``."""
        counts = shared.counts()
        self._raise(self._consumed, "consumed", counts.done)
        for reason, answers in counts.dropped.items():
            self._raise(self._unconsumed.labels(reason), f"not consumed {reason}", answers)
        self._raise(self._overflowed, "overflowed", shared.corpus.overflowed)
        self._corpus_tokens.set(shared.corpus.num_tokens)
        self._corpus_bytes.set(shared.corpus.nbytes)

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
