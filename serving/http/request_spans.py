"""What a node tells of a request that has ended: one span, with what its verify steps came to."""

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
    """Where a request stands among the spans of its client."""

    context: TraceContext
    """Of the request itself; the id of its answer says the same."""
    parent: TraceContext | None
    """The client's span, where it sent one."""


def teller(trail: Trail, answer_id: str, clock: Callable[[], float] = time.time) -> Callable[[Sequence[Choice]], None]:
    """Tells of a request that begins now, when it is called at its end."""
    start = clock()

    def tell(choices: Sequence[Choice]) -> None:
        spans.record(span_of(trail, answer_id, choices, start, clock()))

    return tell


def span_of(trail: Trail, answer_id: str, choices: Sequence[Choice], start: float, end: float) -> Span:
    """The span of a request."""
    figures = [choice.figures for choice in choices]
    finishes = [choice.finish or "not ended" for choice in choices]
    return Span(
        name="request",
        context=trail.context,
        start=start,
        end=end,
        parent=trail.parent.span if trail.parent else None,
        kind="server",
        attributes={
            "request": answer_id,
            "traced": any(choice.request.trace for choice in choices),
            "choices": len(choices),
            "prompt_tokens": max(len(choice.request.prompt) for choice in choices),
            "output_tokens": sum(choice.cost.tokens for choice in choices),
            "verify_steps": sum(one.verify_steps for one in figures),
            "drafted": sum(one.draft_tokens for one in figures),
            "accepted": sum(one.accepted_tokens for one in figures),
            "speculators": list(dict.fromkeys(version for one in figures for version in one.speculators)),
            "finish": list(dict.fromkeys(finishes)),
        },
    )
