"""Figures of the plugin on SGLang's own ``/metrics`` (with its flag ``--enable-metrics``).

SGLang collects them from files that each of its processes writes, so they are plain counters, no collector of ours.
They are made on first use, in the scheduler: SGLang says where those files are only after plugins were loaded.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from serving.traces.accounting import TraceCounts

_STEP_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)


class Figures:
    """Counters since the start of the scheduler."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(name, says, labels, registry=registry)

        self.errors = counter("aurora_sglang_hook_errors", "Hooks that failed; the server went on.", "hook")
        self.untraced = counter("aurora_sglang_requests_untraced", "Requests not traced, or no further.", "reason")
        self.verify_steps_lost = counter(
            "aurora_sglang_verify_steps_lost", "Verify steps that were not recorded.", "reason"
        )
        self.cached = counter("aurora_sglang_prompt_tokens_cached", "Prompt tokens whose states were not computed.")
        self.hooks = Histogram(
            "aurora_sglang_hook_seconds", "Time of the hooks in a step.", buckets=_STEP_S, registry=registry
        )
        self.spent = Gauge(
            "aurora_sglang_capture_spent",
            "Share of the steps' time that recording took.",
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.share = Gauge(
            "aurora_sglang_capture_share",
            "Share of the requests that the cost lets be traced.",
            multiprocess_mode="livemin",
            registry=registry,
        )
        self.breaker_open = Gauge(
            "aurora_sglang_breaker_open",
            "1 while the broker is tried only now and then.",
            multiprocess_mode="livemax",
            registry=registry,
        )
        self._captured = counter("aurora_serve_trace_rows_captured", "Verify steps handed over.")
        self._published = counter("aurora_serve_trace_rows_published", "Verify steps acknowledged.")
        self._shed = counter("aurora_serve_trace_rows_shed", "Verify steps given up, by reason.", "reason")
        self._sampled_out = counter("aurora_serve_trace_requests_sampled_out", "Requests outside the traced share.")
        self._told: Counts[str] = Counts()

    def tell(self, counts: TraceCounts) -> None:
        """Bring the publisher's counts up to date."""
        self._raise(self._captured, "captured", counts.captured)
        self._raise(self._published, "published", counts.published)
        self._raise(self._sampled_out, "sampled_out", counts.sampled_out)
        shed: Mapping[str, int] = counts.shed
        for reason, rows in shed.items():
            self._raise(self._shed.labels(reason), f"shed {reason}", rows)

    def _raise(self, counter: Counter, name: str, value: int) -> None:
        counter.inc(value - self._told[name])
        self._told[name] = value
