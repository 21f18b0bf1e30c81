"""Generation: brings the engine's outputs of one request to the event loop, and turns them into text.

A request ends with one span, which sums up its verify steps.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Histogram

from schemas.telemetry import spans
from schemas.telemetry.metrics import counter_by
from schemas.telemetry.spans import Span
from schemas.telemetry.trace_context import TraceContext
from serving.engines.base import Engine, EngineFullError, Output, Request, RequestStats
from serving.http.detokenizer import AnswerText, TextDelta, join_deltas
from serving.http.echo import Echo
from serving.http.errors import ApiError, unavailable
from serving.http.responses import AnswerBuilder, ChoiceUsage, FinishReason
from serving.http.tool_calls import ToolCallParser

Outcome = Literal["stop", "length", "cancelled", "failed", "rejected"]
"""How a choice ended; ``rejected`` counts requests that did not start."""

_ALIVE_CHECK_S = 5.0
_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
_NO_STATS = RequestStats(0, 0, 0, ())


class RequestMetrics:
    """Outcomes and latencies of requests, by choice. Used by the event loop's thread only."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, *more: float) -> Histogram:
            return Histogram(name, text, buckets=(*_BUCKETS, *more), registry=registry)

        self._outcomes: Counter[str] = Counter()
        self._requests = counter_by(
            "aurora_serve_requests", "Choices of requests by outcome.", "outcome", get_args(Outcome), registry
        )
        self.first_token = histogram(
            "aurora_serve_time_to_first_token_seconds", "Time from the request to its first token."
        )
        self.inter_token = histogram(
            "aurora_serve_inter_token_latency_seconds",
            "Time per output token after the first; the tokens of a verify step share its time.",
        )
        self.queue_time = histogram(
            "aurora_serve_request_queue_time_seconds", "Time for which a choice waited for a slot.", 60.0, 120.0
        )
        self.e2e = histogram(
            "aurora_serve_e2e_request_latency_seconds", "Time from the request to its last token.", 60.0, 120.0, 300.0
        )

    def count(self, outcome: Outcome) -> None:
        """Count a choice, or a request that was rejected before it started."""
        self._outcomes[outcome] += 1
        self._requests.labels(outcome).inc()

    @property
    def finished(self) -> int:
        """Choices that were answered."""
        return self._outcomes["stop"] + self._outcomes["length"]

    @property
    def failed(self) -> int:
        """Choices that ended with an error of the node."""
        return self._outcomes["failed"]


@dataclass(slots=True)
class Choice:
    """One sequence of a request."""

    index: int
    request: Request
    answer: AnswerText
    echo: Echo | None = None
    """The prompt, if the answer begins with it."""
    calls: ToolCallParser | None = None
    """Finds calls in the answer, if it may have any."""
    finishes_with_calls: bool = True
    """Whether calls are a finish reason; a function that the request named is none, as in OpenAI's API."""
    finish: FinishReason | None = None
    """None until the choice has ended."""
    error_type: str | None = None
    """Class of the node's failure that ended the choice."""
    stats: RequestStats = _NO_STATS
    """How the choice was decoded; set when it has ended."""
    start: float = field(default_factory=time.perf_counter)
    newest: float = 0.0
    """Time of the newest tokens."""

    @property
    def usage(self) -> ChoiceUsage:
        """The choice's tokens."""
        return ChoiceUsage(self.answer.count, self.stats)

    def read(self, output: Output) -> TextDelta:
        """Return the text that an output adds."""
        has_end = output.finish == "stop" and bool(output.tokens)
        shown = len(output.tokens) - has_end
        delta = self.answer.feed(output.tokens[:shown], output.logprobs[:shown])
        if has_end:
            self.answer.end_with(output.tokens[-1], output.logprobs[-1:])
        if output.finish is not None:
            delta = join_deltas([delta, self.answer.finish()])
        if self.calls is not None:
            parsed = self.calls.feed(delta.text, final=output.finish is not None or self.answer.stopped)
            delta = replace(delta, text=parsed.text, calls=parsed.calls)
        if self.echo is None:
            return delta
        self.echo.scores += output.prompt_logprobs
        # An output without tokens, and without the end, is one of the prefill.
        return self.echo.extend(delta) if output.tokens or output.finish is not None else delta


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """Trace context of a request."""

    context: TraceContext
    """Of the request itself; the id of its answer contains it."""
    parent: TraceContext | None
    """The client's span, if the client sent one."""
    start: float = field(default_factory=time.time)

    def span(self, answer: AnswerBuilder, choices: Sequence[Choice]) -> Span:
        """Return the span of a request that ends now, named after OpenTelemetry's conventions for generative AI."""
        stats = [choice.stats for choice in choices]
        return Span(
            name=f"{answer.operation} {answer.model}",
            event="request_finished",
            context=self.context,
            start=self.start,
            end=time.time(),
            parent=self.parent.span_id if self.parent else None,
            kind="server",
            error_type=next((choice.error_type for choice in choices if choice.error_type), None),
            attributes={
                "gen_ai.operation.name": answer.operation,
                "gen_ai.provider.name": "aurora",
                "gen_ai.request.model": answer.model,
                "gen_ai.request.choice.count": len(choices),
                "gen_ai.response.id": answer.id,
                "gen_ai.response.finish_reasons": [
                    choice.finish or ("error" if choice.error_type else "cancelled") for choice in choices
                ],
                "gen_ai.usage.input_tokens": max(len(choice.request.prompt) for choice in choices),
                "gen_ai.usage.output_tokens": sum(choice.answer.count for choice in choices),
                "traced": any(choice.request.trace for choice in choices),
                "verify_steps": sum(one.verify_steps for one in stats),
                "draft_tokens": sum(one.draft_tokens for one in stats),
                "accepted_tokens": sum(one.accepted_tokens for one in stats),
                "suffix_accepted_tokens": sum(one.suffix_accepted_tokens for one in stats),
                "speculators": list(dict.fromkeys(version for one in stats for version in one.speculators)),
            },
        )


class Generation:
    """The choices of one request in the engine. ``deltas`` can be read once.

    Args:
        engine: Decodes the choices.
        answer: Names the answer in the span.
        choices: Sequences to generate.
        metrics: Counts the choices.
        trace: Trace context; its span is recorded once, when the request ends.
    """

    def __init__(
        self,
        engine: Engine,
        answer: AnswerBuilder,
        choices: Sequence[Choice],
        metrics: RequestMetrics,
        trace: RequestTrace,
    ) -> None:
        self.choices = tuple(choices)
        self._engine = engine
        self._answer = answer
        self._metrics = metrics
        self._trace: RequestTrace | None = trace
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        self._running: set[int] = set()

    def submit(self) -> None:
        """Queue all choices in the engine, or none.

        Raises:
            ApiError: the engine is full (429) or does not run (503).
        """
        if not self._engine.health().alive:
            self._metrics.count("failed")
            raise unavailable("The engine is not running")
        try:
            for choice in self.choices:
                self._engine.submit(choice.request, partial(self._on_output, choice.index))
                self._running.add(choice.index)
        except EngineFullError as error:
            self.close()
            message = f"The engine is full, try again later: {error}"
            raise ApiError(429, message, kind="rate_limit_error", code="engine_full") from error

    async def deltas(self) -> AsyncGenerator[tuple[Choice, TextDelta], None]:
        """Yield the deltas of all choices as they arrive; with the last one of a choice, its ``finish`` is set.

        Raises:
            ApiError: the engine failed, or stopped before the end of the answer.
        """
        while self._running:
            index, output = await self._next()
            choice, was_stopped = self.choices[index], self.choices[index].answer.stopped
            delta = TextDelta() if was_stopped else self._read(choice, output)
            if output.finish is not None:
                self._end(choice, output)
            elif choice.answer.stopped and not was_stopped:
                self._engine.cancel(choice.request.id)
            if delta or choice.finish is not None:
                yield choice, delta

    def close(self) -> None:
        """Cancel the choices that still run, and record the request's span."""
        running, self._running = self._running, set()
        for index in running:
            self._metrics.count("cancelled")
            self._engine.cancel(self.choices[index].request.id)
        trace, self._trace = self._trace, None
        if trace is not None:
            spans.record(trace.span(self._answer, self.choices))

    def _on_output(self, index: int, output: Output) -> None:
        """Queue an output; called on the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: the server has stopped, and no client waits
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, (index, output))

    async def _next(self) -> tuple[int, Output]:
        while True:
            with suppress(TimeoutError):
                return await asyncio.wait_for(self._outputs.get(), _ALIVE_CHECK_S)
            health = self._engine.health()
            if not health.alive and self._outputs.empty():
                return min(self._running), Output((), finish="error", error=health.error or "the engine stopped")

    def _read(self, choice: Choice, output: Output) -> TextDelta:
        before = choice.answer.count
        delta = choice.read(output)
        self._observe(choice, before, choice.answer.count - before)
        return delta

    def _end(self, choice: Choice, output: Output) -> None:
        self._running.remove(choice.index)
        choice.stats = output.stats or choice.stats
        if choice.stats.queue_s is not None:
            self._metrics.queue_time.observe(choice.stats.queue_s)
        stopped = choice.answer.stopped
        if output.finish == "error":
            self._metrics.count("failed")
            choice.error_type = "engine_failed"
            raise ApiError(500, f"The request failed: {output.error}", kind="server_error", code="engine_failed")
        if output.finish == "cancelled" and not stopped:
            self._metrics.count("cancelled")
            choice.error_type = "node_stopped"
            raise unavailable("The node stopped before the answer was complete")
        choice.finish = "length" if output.finish == "length" and not stopped else "stop"
        self._metrics.count(choice.finish)
        if choice.finish == "stop" and choice.calls is not None and choice.calls.count and choice.finishes_with_calls:
            choice.finish = "tool_calls"
        self._metrics.e2e.observe(time.perf_counter() - choice.start)

    def _observe(self, choice: Choice, before: int, tokens: int) -> None:
        """Observe the latency of ``tokens`` new tokens after the ``before`` first ones."""
        if not tokens:
            return
        now = time.perf_counter()
        previous, choice.newest = choice.newest, now
        if before == 0:
            self._metrics.first_token.observe(now - choice.start)
            return
        for _ in range(tokens):
            self._metrics.inter_token.observe((now - previous) / tokens)
