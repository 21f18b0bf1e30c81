"""Spans: finished operations, written to the log and exported to an OpenTelemetry collector.

Both forms carry the same ids and attributes. Log lines are written if ``telemetry.log_spans`` is set. Spans are
exported if ``telemetry.endpoint`` is set, by the exporter's thread: a slow or unreachable collector delays no caller.
The exporter drops spans that its queue cannot hold, and logs a warning. OpenTelemetry is imported only if it is used.

Names and attributes follow the OpenTelemetry semantic conventions for generative AI and for messaging. Attribute names
of Aurora's own are written here without a prefix and exported below ``aurora.``.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import structlog

from schemas.settings import SettingsError, Telemetry
from schemas.telemetry.trace_context import TraceContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

log = structlog.get_logger()

MAX_LINKS = 128
"""Maximum links of a span, OpenTelemetry's default limit; an operation with more links is split into several spans."""

Kind = Literal["server", "producer", "consumer", "internal"]
AttributeValue = str | int | float | bool | Sequence[str]


@dataclass(frozen=True, slots=True)
class Span:
    """A finished operation."""

    name: str
    """Name of the span at the collector."""
    event: str
    """Event name of its log line."""
    context: TraceContext
    start: float
    """Unix time in seconds."""
    end: float
    """Unix time in seconds."""
    parent: str | None = None
    """Span id of the parent, in the same trace."""
    kind: Kind = "internal"
    links: tuple[TraceContext, ...] = ()
    """Related spans of other traces."""
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    """A name with a dot is one of the semantic conventions, any other is Aurora's own."""
    error_type: str | None = None
    """Class of the failure, low in cardinality; None if the operation succeeded."""


class _Telemetry:
    """Where this process writes its spans."""

    log_spans = False
    exporter: _Exporter | None = None


def configure(process: str, settings: Telemetry) -> None:
    """Start writing spans; until then ``record`` does nothing.

    Raises:
        SettingsError: ``telemetry.endpoint`` is set and OpenTelemetry is not installed.
    """
    close()
    _Telemetry.log_spans = settings.log_spans
    if settings.endpoint:
        _Telemetry.exporter = _Exporter(process, settings)


def close() -> None:
    """Export the queued spans, and stop writing spans."""
    exporter, _Telemetry.exporter, _Telemetry.log_spans = _Telemetry.exporter, None, False
    if exporter is not None:
        exporter.close()


def record(span: Span) -> None:
    """Write a span. A failing collector causes no exception and no delay."""
    if _Telemetry.log_spans:
        log.info(
            span.event,
            trace_id=span.context.trace_id,
            span_id=span.context.span_id,
            duration_s=round(span.end - span.start, 6),
            **({"links": [link.trace_id for link in span.links]} if span.links else {}),
            **_attributes(span),
        )
    if _Telemetry.exporter is not None and span.context.sampled:
        _Telemetry.exporter.send(span)


class _Exporter:
    """Exports spans by OTLP over HTTP."""

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
        self._processor = BatchSpanProcessor(exporter, schedule_delay_millis=settings.export_interval * 1e3)
        self._resource = Resource(
            {"service.namespace": "aurora", "service.name": f"aurora-{process}", "host.name": socket.gethostname()}
        )

    def send(self, span: Span) -> None:
        """Queue a span."""
        self._processor.on_end(self._to_readable(span))

    def close(self) -> None:
        """Export the queued spans."""
        self._processor.shutdown()  # type: ignore[no-untyped-call]

    def _to_readable(self, span: Span) -> ReadableSpan:
        """Convert a span to the SDK's type directly: a tracer would draw ids of its own."""
        from opentelemetry import trace
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace.status import Status, StatusCode

        def span_context(context: TraceContext, *, remote: bool) -> trace.SpanContext:
            flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if context.sampled else trace.TraceFlags.DEFAULT)
            return trace.SpanContext(int(context.trace_id, 16), int(context.span_id, 16), remote, flags)

        parent = TraceContext(span.context.trace_id, span.parent) if span.parent else None
        return ReadableSpan(
            name=span.name,
            context=span_context(span.context, remote=False),
            parent=span_context(parent, remote=True) if parent else None,
            resource=self._resource,
            attributes={n if "." in n else f"aurora.{n}": value for n, value in _attributes(span).items()},
            links=[trace.Link(span_context(link, remote=True)) for link in span.links],
            kind=trace.SpanKind[span.kind.upper()],
            instrumentation_scope=InstrumentationScope("aurora"),
            status=Status(StatusCode.ERROR if span.error_type else StatusCode.UNSET),
            start_time=round(span.start * 1e9),
            end_time=round(span.end * 1e9),
        )


def _attributes(span: Span) -> dict[str, Any]:
    error = {"error.type": span.error_type} if span.error_type else {}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in span.attributes.items()} | error
