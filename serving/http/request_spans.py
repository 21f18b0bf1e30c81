"""The span of a request, recorded when the request ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from schemas.telemetry import spans
from schemas.telemetry.spans import Span
from schemas.telemetry.trace_context import TraceContext
from serving.http.generation import Choice


@dataclass(frozen=True, slots=True)
class Trail:
    """Trace context of a request."""

    context: TraceContext
    """Span of the request; the response id carries the same ids."""
    parent: TraceContext | None
    """Span of the client, if it sent one."""


def teller(
    trail: Trail, response_id: str, model: str, clock: Callable[[], float] = time.time
) -> Callable[[Sequence[Choice]], None]:
    """Return a function that records the span of a request that starts now; call it when the request ends."""
    start = clock()

    def tell(choices: Sequence[Choice]) -> None:
        spans.record(request_span(trail, response_id, model, choices, start, clock()))

    return tell


def request_span(
    trail: Trail, response_id: str, model: str, choices: Sequence[Choice], start: float, end: float
) -> Span:
    """Return the span of a request, named after OpenTelemetry's conventions for generative AI."""
    figures = [choice.figures for choice in choices]
    operation = "chat" if response_id.startswith("chatcmpl") else "text_completion"
    return Span(
        name=f"{operation} {model}",
        event="request_finished",
        context=trail.context,
        start=start,
        end=end,
        parent=trail.parent.span_id if trail.parent else None,
        kind="server",
        error_type=next((choice.error_type for choice in choices if choice.error_type), None),
        attributes={
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "aurora",
            "gen_ai.request.model": model,
            "gen_ai.request.choice.count": len(choices),
            "gen_ai.response.id": response_id,
            "gen_ai.response.finish_reasons": [choice.finish or "cancelled" for choice in choices],
            "gen_ai.usage.input_tokens": max(len(choice.request.prompt) for choice in choices),
            "gen_ai.usage.output_tokens": sum(choice.cost.tokens for choice in choices),
            "traced": any(choice.request.trace for choice in choices),
            "verify_steps": sum(one.verify_steps for one in figures),
            "draft_tokens": sum(one.draft_tokens for one in figures),
            "accepted_tokens": sum(one.accepted_tokens for one in figures),
            "speculators": list(dict.fromkeys(version for one in figures for version in one.speculators)),
        },
    )
