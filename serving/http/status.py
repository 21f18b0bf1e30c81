"""Operator's endpoints of a node: liveness, readiness, status and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from schemas.settings.sections import SuffixScope
from schemas.status import CorpusStatus, PrefixCacheStatus, ServeStatus
from serving.answers.answer_consumer import AnswerConsumer
from serving.answers.answer_counts import AnswerCounts
from serving.answers.answer_publisher import AnswerPublisher
from serving.answers.scoped_corpus import ScopedCorpus
from serving.engines.base import HotSwapEngine
from serving.engines.builtin.prefix_cache import PrefixCache
from serving.http.server import Drain
from serving.traces.accounting import TraceCounts
from serving.versions.poller import VersionPoller

_NO_ANSWERS = AnswerCounts(0, {})
_NO_TRACES = TraceCounts(0, 0, {}, 0, 0)


class RequestOutcomes(Protocol):
    """Counts of ended requests."""

    @property
    def finished(self) -> int:
        """Requests that were answered."""

    @property
    def failed(self) -> int:
        """Requests that ended with an error of the node."""


class TraceSource(Protocol):
    """A publisher of traces."""

    @property
    def circuit_breaker(self) -> str:
        """State of the circuit breaker of the broker."""

    def counts(self) -> TraceCounts:
        """Return the counts of rows."""

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics at scrape time."""


class CorpusReport(NamedTuple):
    """The corpus of a node, and its exchange with the answers topic."""

    scope: SuffixScope
    corpus: ScopedCorpus
    publisher: AnswerPublisher | None
    """None if the node publishes no answers."""
    consumer: AnswerConsumer | None
    """None if it reads none."""

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics at scrape time."""
        for source in (self.corpus, self.publisher, self.consumer):
            if source is not None:
                yield from source.collect()

    def status(self) -> CorpusStatus:
        """Return the status."""
        published = self.publisher.counts() if self.publisher else _NO_ANSWERS
        consumed = self.consumer.counts() if self.consumer else _NO_ANSWERS
        return CorpusStatus(
            scope=self.scope,
            tokens=self.corpus.num_tokens,
            bytes=self.corpus.nbytes,
            answers_published=published.done,
            answers_not_published=dict(published.dropped),
            answers_consumed=consumed.done,
            answers_not_consumed=dict(consumed.dropped),
            answers_lag=self.consumer.lag if self.consumer else 0,
            answers_error=self.consumer.error if self.consumer else None,
        )


class PrefixCacheReport(NamedTuple):
    """The prefix cache of a node."""

    cache: PrefixCache

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics at scrape time."""
        return self.cache.collect()

    def status(self) -> PrefixCacheStatus:
        """Return the status."""
        cache = self.cache
        return PrefixCacheStatus(
            scope=cache.scope,
            is_on=cache.is_on,
            bytes=cache.nbytes,
            hits=cache.hits,
            cached_tokens=cache.cached_tokens,
            evictions=cache.evictions,
            failures=cache.failures,
        )


class Reports(NamedTuple):
    """The parts of a node that report, beside its engine; None for a part that it does not have."""

    traces: TraceSource | None = None
    poller: VersionPoller | None = None
    corpus: CorpusReport | None = None
    prefix_cache: PrefixCacheReport | None = None


class EngineMetrics:
    """The engine's counters and the node's readiness, read at scrape time."""

    def __init__(self, engine: HotSwapEngine, drain: Drain) -> None:
        self._engine, self._drain = engine, drain

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics at scrape time."""
        health = self._engine.health()
        for name, text, value in (
            ("aurora_serve_verify_steps", "Verify steps.", health.verify_steps),
            ("aurora_serve_draft_tokens", "Draft tokens.", health.draft_tokens),
            ("aurora_serve_accepted_tokens", "Accepted draft tokens.", health.accepted_tokens),
            (
                "aurora_serve_suffix_draft_tokens",
                "Draft tokens that only the suffix drafter proposed.",
                health.suffix_draft_tokens,
            ),
            (
                "aurora_serve_suffix_accepted_tokens",
                "Accepted draft tokens that only the suffix drafter proposed.",
                health.suffix_accepted_tokens,
            ),
            ("aurora_serve_output_tokens", "Output tokens.", health.output_tokens),
            (
                "aurora_serve_drafter_failures",
                "Failures of a drafter; each turned speculation off.",
                health.drafter_failures,
            ),
            (
                "aurora_serve_decoding_seconds",
                "Time of the verify steps that read no prompt, while speculation is on.",
                health.decoding_s,
            ),
            (
                "aurora_serve_undrafted_decoding_seconds",
                "Time that these verify steps' output would have taken without drafts, as the planner expects.",
                health.undrafted_s,
            ),
        ):
            yield CounterMetricFamily(name, text, value=value)
        rates = GaugeMetricFamily(
            "aurora_serve_expected_tokens_per_second",
            "Expected output rate: 0 without drafts, n with drafts of the speculator up to depth n.",
            labels=["draft_depth"],
        )
        for depth, rate in enumerate(health.expected_tokens_per_second):
            rates.add_metric([str(depth)], rate)
        yield rates
        if health.speedup is not None:
            yield GaugeMetricFamily(
                "aurora_serve_speculation_speedup_ratio",
                "Recent output rate of decoding over the rate that the planner expects without drafts.",
                value=health.speedup,
            )
        for name, text, value in (
            (
                "aurora_serve_draft_depth",
                "Draft tokens of the speculator per request and verify step, one after the other.",
                health.draft_depth,
            ),
            ("aurora_serve_requests_running", "Requests that are decoded.", health.requests_running),
            ("aurora_serve_requests_waiting", "Requests that wait for a slot.", health.requests_waiting),
            ("aurora_serve_engine_up", "1 while the engine runs.", int(health.alive)),
            (
                "aurora_serve_ready",
                "1 while the node takes requests: its engine runs, and it does not drain.",
                int(health.alive and not self._drain.is_draining),
            ),
        ):
            yield GaugeMetricFamily(name, text, value=value)


def add_routes(
    app: FastAPI,
    node: str,
    engine: HotSwapEngine,
    outcomes: RequestOutcomes,
    metrics: CollectorRegistry,
    reports: Reports,
    drain: Drain,
) -> None:
    """Add the endpoints to the application, and all collectors to ``metrics``."""
    for source in (EngineMetrics(engine, drain), *reports):
        if source is not None:
            metrics.register(source)

    def respond(*, is_ok: bool) -> JSONResponse:
        health = engine.health()
        body = {"alive": health.alive, "draining": drain.is_draining, "error": health.error}
        return JSONResponse(body, status_code=200 if is_ok else 503)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        """Answer 200 while the engine runs, else 503."""
        return respond(is_ok=engine.health().alive)

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Answer 200 until the node drains or its engine fails, then 503."""
        return respond(is_ok=engine.health().alive and not drain.is_draining)

    @app.get("/metrics")
    async def scrape() -> Response:
        """Export Prometheus metrics."""
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status")
    async def status() -> ServeStatus:
        """Report the state of the node."""
        return serve_status(node, engine, outcomes, reports, drain)


def serve_status(
    node: str,
    engine: HotSwapEngine,
    outcomes: RequestOutcomes,
    reports: Reports,
    drain: Drain,
) -> ServeStatus:
    """Return the status of the node."""
    health = engine.health()
    traces, poller, corpus, prefix_cache = reports
    rows = traces.counts() if traces else _NO_TRACES
    return ServeStatus(
        node=node,
        target=engine.target,
        line=engine.line,
        engine_up=health.alive,
        draining=drain.is_draining,
        speculator=health.speculator,
        speculating=health.speculating,
        draft_depth=health.draft_depth,
        expected_tokens_per_second=list(health.expected_tokens_per_second),
        speedup=health.speedup,
        saved_s=health.undrafted_s - health.decoding_s,
        role=poller.role if poller else None,
        pinned=poller.pinned if poller else None,
        requests_running=health.requests_running,
        requests_waiting=health.requests_waiting,
        requests_finished=outcomes.finished,
        requests_failed=outcomes.failed,
        verify_steps=health.verify_steps,
        draft_tokens=health.draft_tokens,
        accepted_tokens=health.accepted_tokens,
        suffix_accepted_tokens=health.suffix_accepted_tokens,
        output_tokens=health.output_tokens,
        acceptance_length=1 + health.accepted_tokens / health.verify_steps if health.verify_steps else None,
        rows_captured=rows.captured,
        rows_published=rows.published,
        rows_dropped=rows.rows_dropped,
        rows_pending=rows.pending,
        circuit_breaker=traces.circuit_breaker if traces else "closed",
        registry_error=poller.error if poller else None,
        registry_stale_responses=poller.stale_count if poller else 0,
        swaps=list(poller.swaps) if poller else [],
        versions_rejected=list(poller.rejected) if poller else [],
        corpus=corpus.status() if corpus else None,
        prefix_cache=prefix_cache.status() if prefix_cache else None,
    )
