"""What a process did, told once and in two forms: a line of its log, and a span for an OpenTelemetry collector.

Both have the same names, so that a trace id found in one is found in the other. Lines are written where
``telemetry.log_spans`` says so; spans go to ``telemetry.endpoint`` where that is set, from a thread of their own: a
collector that is slow or away makes nobody wait, and what its queue cannot hold is dropped with a warning in the log.
OpenTelemetry is imported only then.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import structlog

from schemas.settings import SettingsError, Telemetry
from schemas.telemetry.trace_context import TraceContext

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan

log = structlog.get_logger()

LINKS = 128
"""Links of a span at most, OpenTelemetry's own bound; whoever has more tells several spans."""

Kind = Literal["server", "producer", "consumer", "internal"]
Value = str | int | float | bool | Sequence[str]


@dataclass(frozen=True, slots=True)
class Span:
    """Something that was done, from one time to another."""

    name: str
    context: TraceContext
    start: float
    """Unix time in seconds, as ``end``."""
    end: float
    parent: str | None = None
    """Span id in the same trace."""
    kind: Kind = "internal"
    links: tuple[TraceContext, ...] = ()
    """Other traces that it has to do with."""
    attributes: Mapping[str, Value] = field(default_factory=dict)
    error: str | None = None


class _Exporter(Protocol):
    def send(self, span: Span) -> None:
        """Queue a span."""

    def close(self) -> None:
        """Send what is queued."""


class _State:
    """What this process does with its spans; like the log, there is one for the process."""

    log = False
    exporter: _Exporter | None = None


def configure(process: str, settings: Telemetry) -> None:
    """Begin to tell; before that ``record`` does nothing.

    Raises:
        SettingsError: ``telemetry.endpoint`` is set and OpenTelemetry is not installed.
    """
    close()
    _State.log = settings.log_spans
    if settings.endpoint:
        _State.exporter = _Collector(process, settings)


def close() -> None:
    """Send what is queued, and stop telling."""
    exporter, _State.exporter, _State.log = _State.exporter, None, False
    if exporter is not None:
        exporter.close()


def record(span: Span) -> None:
    """Tell what was done. Never raises for a collector's sake, and never waits for it."""
    if _State.log:
        links = {"links": [link.trace for link in span.links]} if span.links else {}
        log.info(
            span.name,
            trace=span.context.trace,
            span=span.context.span,
            seconds=round(span.end - span.start, 6),
            **links,
            **span.attributes,
            **({"error": span.error} if span.error else {}),
        )
    if _State.exporter is not None and span.context.sampled:
        _State.exporter.send(span)


class _Collector:
    """Sends spans by OTLP over HTTP."""

    def __init__(self, process: str, settings: Telemetry) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            message = f"telemetry.endpoint: spans need the extra `telemetry` of this package ({error})"
            raise SettingsError(message) from error
        exporter = OTLPSpanExporter(
            endpoint=f"{settings.endpoint.rstrip('/')}/v1/traces",
            headers=settings.headers,
            timeout=settings.timeout,
        )
        self._batches = BatchSpanProcessor(exporter, schedule_delay_millis=settings.export_interval * 1e3)
        self._resource = Resource(
            {"service.namespace": "aurora", "service.name": f"aurora-{process}", "host.name": socket.gethostname()}
        )

    def send(self, span: Span) -> None:
        self._batches.on_end(_readable(span, self._resource))

    def close(self) -> None:
        self._batches.shutdown()  # type: ignore[no-untyped-call]


def _readable(span: Span, resource: Resource) -> ReadableSpan:
    """The span as the SDK's processors take one: its ids are given, the SDK would draw new ones."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace.status import Status, StatusCode

    def context(of: TraceContext, *, remote: bool) -> trace.SpanContext:
        flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if of.sampled else trace.TraceFlags.DEFAULT)
        return trace.SpanContext(int(of.trace, 16), int(of.span, 16), remote, flags)

    def parent_of() -> trace.SpanContext | None:
        if span.parent is None:
            return None
        return context(TraceContext(span.context.trace, span.parent), remote=True)

    attributes: dict[str, Any] = {
        f"aurora.{name}": list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in span.attributes.items()
    }
    return ReadableSpan(
        name=span.name,
        context=context(span.context, remote=False),
        parent=parent_of(),
        resource=resource,
        attributes=attributes,
        links=[trace.Link(context(link, remote=True)) for link in span.links],
        kind=trace.SpanKind[span.kind.upper()],
        instrumentation_scope=InstrumentationScope("aurora"),
        status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.OK),
        start_time=round(span.start * 1e9),
        end_time=round(span.end * 1e9),
    )
