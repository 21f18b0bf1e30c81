"""The operator's endpoints: is it alive, is it ready, what does it serve, and its metrics."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from schemas.status import RefusedStatus, ServeStatus, SwapStatus
from serving.engine import Engine
from serving.generation import RequestFigures
from serving.ledger import TraceCounts
from serving.puller import Puller
from serving.traces import TracePublisher

_NO_TRACES = TraceCounts(0, 0, {}, 0, 0)


class EngineMetrics:
    """The engine's counters, read at scrape time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Metrics of one moment."""
        health = self._engine.health()
        yield CounterMetricFamily("aurora_serve_rounds", "Verify rounds.", value=health.rounds)
        yield CounterMetricFamily("aurora_serve_drafted_tokens", "Tokens drafted.", value=health.drafted)
        yield CounterMetricFamily("aurora_serve_accepted_tokens", "Drafted tokens accepted.", value=health.accepted)
        yield CounterMetricFamily("aurora_serve_output_tokens", "Tokens answered.", value=health.output_tokens)
        yield GaugeMetricFamily("aurora_serve_running", "Requests being decoded.", value=health.running)
        yield GaugeMetricFamily("aurora_serve_waiting", "Requests that wait.", value=health.waiting)
        yield GaugeMetricFamily("aurora_serve_alive", "1 while the engine runs.", value=int(health.alive))


def add(
    app: FastAPI,
    node: str,
    engine: Engine,
    figures: RequestFigures,
    metrics: CollectorRegistry,
    publisher: TracePublisher | None,
    puller: Puller | None,
) -> None:
    """Add the endpoints to the application, and everything that counts to ``metrics``."""
    for source in (EngineMetrics(engine), publisher, puller):
        if source is not None:
            metrics.register(source)

    @app.get("/health")
    @app.get("/ready")
    async def health() -> JSONResponse:
        state = engine.health()
        body = {"alive": state.alive, "error": state.error}
        return JSONResponse(body, status_code=200 if state.alive else 503)

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status")
    async def status() -> ServeStatus:
        return describe(node, engine, figures, publisher, puller)


def describe(
    node: str, engine: Engine, figures: RequestFigures, publisher: TracePublisher | None, puller: Puller | None
) -> ServeStatus:
    """What the node is doing."""
    health = engine.health()
    rows = publisher.counts() if publisher else _NO_TRACES
    swaps = puller.swaps if puller else ()
    refused = puller.refused if puller else ()
    return ServeStatus(
        node=node,
        target=engine.target,
        line=engine.line,
        alive=health.alive,
        speculator=health.speculator,
        running=health.running,
        waiting=health.waiting,
        finished=figures.finished,
        failed=figures.failed,
        rounds=health.rounds,
        drafted=health.drafted,
        accepted=health.accepted,
        output_tokens=health.output_tokens,
        rows_captured=rows.captured,
        rows_published=rows.published,
        rows_shed=rows.rows_shed,
        rows_pending=rows.pending,
        breaker=publisher.breaker if publisher else "closed",
        registry_error=puller.error if puller else None,
        swaps=[SwapStatus(version=s.version, time=s.time, in_flight=s.in_flight, pause_ms=s.pause_ms) for s in swaps],
        refused=[RefusedStatus(version=r.version, time=r.time, why=r.why) for r in refused],
    )
