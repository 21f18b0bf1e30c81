"""The operator's endpoints: is it alive, is it ready, what does it serve, and its metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from schemas.status import RejectedVersionStatus, ServeStatus, SwapStatus
from serving.engines.base import HotSwapEngine
from serving.http.drain import Drain
from serving.traces.accounting import TraceCounts
from serving.versions.poller import Puller

_NO_TRACES = TraceCounts(0, 0, {}, 0, 0)


class Ended(Protocol):
    """How many requests have ended, and how."""

    @property
    def finished(self) -> int:
        """Those that were answered."""

    @property
    def failed(self) -> int:
        """Those that ended by a fault of the node."""


class Traced(Protocol):
    """Who publishes traces."""

    @property
    def breaker(self) -> str:
        """State of the breaker before the broker."""

    def counts(self) -> TraceCounts:
        """Where the rows are."""

    def collect(self) -> Iterator[Metric]:
        """Metrics of one moment."""


class EngineMetrics:
    """The engine's counters, read at scrape time."""

    def __init__(self, engine: HotSwapEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Metrics of one moment."""
        health = self._engine.health()
        yield CounterMetricFamily("aurora_serve_verify_steps", "Verify steps.", value=health.verify_steps)
        yield CounterMetricFamily("aurora_serve_drafted_tokens", "Tokens drafted.", value=health.draft_tokens)
        yield CounterMetricFamily(
            "aurora_serve_accepted_tokens", "Drafted tokens accepted.", value=health.accepted_tokens
        )
        yield CounterMetricFamily("aurora_serve_output_tokens", "Tokens answered.", value=health.output_tokens)
        yield GaugeMetricFamily("aurora_serve_draft_depth", "Tokens drafted a request.", value=health.draft_depth)
        rates = GaugeMetricFamily(
            "aurora_serve_expected_tokens_per_second", "By drafted tokens a request.", labels=["drafted"]
        )
        for drafted, rate in enumerate(health.expected_tokens_per_second):
            rates.add_metric([str(drafted)], rate)
        yield rates
        yield GaugeMetricFamily("aurora_serve_running", "Requests being decoded.", value=health.requests_running)
        yield GaugeMetricFamily("aurora_serve_waiting", "Requests that wait.", value=health.requests_waiting)
        yield GaugeMetricFamily("aurora_serve_alive", "1 while the engine runs.", value=int(health.alive))


def add(
    app: FastAPI,
    node: str,
    engine: HotSwapEngine,
    figures: Ended,
    metrics: CollectorRegistry,
    publisher: Traced | None,
    puller: Puller | None,
    drain: Drain,
) -> None:
    """Add the endpoints to the application, and everything that counts to ``metrics``."""
    for source in (EngineMetrics(engine), publisher, puller):
        if source is not None:
            metrics.register(source)

    def state(*, good: bool) -> JSONResponse:
        health = engine.health()
        body = {"alive": health.alive, "draining": drain.begun, "error": health.error}
        return JSONResponse(body, status_code=200 if good else 503)

    @app.get("/health")
    async def health() -> JSONResponse:
        return state(good=engine.health().alive)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        return state(good=engine.health().alive and not drain.begun)

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status")
    async def status() -> ServeStatus:
        return describe(node, engine, figures, publisher, puller, drain)


def describe(
    node: str,
    engine: HotSwapEngine,
    figures: Ended,
    publisher: Traced | None,
    puller: Puller | None,
    drain: Drain,
) -> ServeStatus:
    """What the node is doing."""
    health = engine.health()
    rows = publisher.counts() if publisher else _NO_TRACES
    return ServeStatus(
        node=node,
        target=engine.target,
        line=engine.line,
        engine_up=health.alive,
        draining=drain.begun,
        speculator=health.speculator,
        speculating=health.speculating,
        draft_depth=health.draft_depth,
        expected_tokens_per_second=list(health.expected_tokens_per_second),
        role=puller.role if puller else None,
        pinned=puller.pinned if puller else None,
        requests_running=health.requests_running,
        requests_waiting=health.requests_waiting,
        requests_finished=figures.finished,
        requests_failed=figures.failed,
        verify_steps=health.verify_steps,
        draft_tokens=health.draft_tokens,
        accepted_tokens=health.accepted_tokens,
        output_tokens=health.output_tokens,
        acceptance_length=1 + health.accepted_tokens / health.verify_steps if health.verify_steps else None,
        rows_captured=rows.captured,
        rows_published=rows.published,
        rows_dropped=rows.rows_shed,
        rows_pending=rows.pending,
        circuit_breaker=publisher.breaker if publisher else "closed",
        registry_error=puller.error if puller else None,
        registry_stale_responses=puller.stale if puller else 0,
        swaps=swaps_of(puller),
        versions_rejected=refused_of(puller),
    )


def swaps_of(puller: Puller | None) -> list[SwapStatus]:
    """The newest swaps, oldest first."""
    swaps = puller.swaps if puller else ()
    return [SwapStatus(version=s.version, time=s.time, in_flight=s.in_flight, pause_ms=s.pause_ms) for s in swaps]


def refused_of(puller: Puller | None) -> list[RejectedVersionStatus]:
    """Versions that the node will not serve."""
    refused = puller.refused if puller else ()
    return [RejectedVersionStatus(version=r.version, time=r.time, why=r.why) for r in refused]
