"""One answer in the making: the engine's outputs, brought to the event loop and turned into text."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import suppress

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client import Counter as PrometheusCounter

from serving.engine import Engine, EngineFullError, Output, Request
from serving.openai import ApiError, FinishReason, Tally, unavailable
from serving.text import Detokenizer, StopScanner

_ALIVE_CHECK_S = 5.0
_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)


class RequestFigures:
    """How requests went. Only the event loop's thread counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._outcomes: Counter[str] = Counter()
        self._requests = PrometheusCounter(
            "aurora_serve_requests", "Requests by outcome.", ["outcome"], registry=registry
        )
        self.first_token = Histogram(
            "aurora_serve_first_token_seconds",
            "From the request to its first token.",
            buckets=_BUCKETS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "aurora_serve_between_tokens_seconds",
            "Time per output token after the first; a round's time is shared by its tokens.",
            buckets=_BUCKETS,
            registry=registry,
        )

    def ended(self, outcome: str) -> None:
        """Count a request: stop, length, cancelled, failed, or refused before it began."""
        self._outcomes[outcome] += 1
        self._requests.labels(outcome).inc()

    @property
    def finished(self) -> int:
        """Requests that were answered."""
        return self._outcomes["stop"] + self._outcomes["length"]

    @property
    def failed(self) -> int:
        """Requests that ended by a fault of the node."""
        return self._outcomes["failed"]


class Generation:
    """A request in the engine. ``texts`` can be read once; what it cost is in ``tally`` afterwards."""

    def __init__(
        self, engine: Engine, request: Request, detokenizer: Detokenizer, stops: StopScanner, figures: RequestFigures
    ) -> None:
        self.tally = Tally(len(request.prompt))
        self.finish: FinishReason = "stop"
        self._engine = engine
        self._request = request
        self._detokenizer = detokenizer
        self._stops = stops
        self._figures = figures
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[Output] = asyncio.Queue()
        self._last = time.perf_counter()
        self._running = False

    def submit(self) -> None:
        """Queue the request in the engine.

        Raises:
            ApiError: the engine is full (429) or does not run (503).
        """
        if not self._engine.health().alive:
            self._figures.ended("failed")
            raise unavailable("The engine is not running")
        try:
            self._engine.submit(self._request, self._hand_over)
        except EngineFullError as error:
            message = f"The engine is full, try again later: {error}"
            raise ApiError(429, message, kind="rate_limit_error", code="engine_full") from error
        self._running = True

    async def texts(self) -> AsyncGenerator[str, None]:
        """Pieces of the answer, as they come.

        Raises:
            ApiError: the engine failed or stopped in mid-answer.
        """
        while self._running:
            output = await self._next()
            if not self._stops.stopped:
                self._time(len(output.tokens))
                self.tally.completion_tokens += len(output.tokens)
                if text := self._text(output):
                    yield text
                if self._stops.stopped and output.finish is None:
                    self._engine.cancel(self._request.id)
            if output.finish is not None:
                self._end(output)

    def abandon(self) -> None:
        """Nobody waits for the answer any more; no-op where it has ended."""
        if self._running:
            self._running = False
            self._figures.ended("cancelled")
            self._engine.cancel(self._request.id)

    def _hand_over(self, output: Output) -> None:
        """Called on the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: the server has gone, and nobody waits
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, output)

    async def _next(self) -> Output:
        while True:
            with suppress(TimeoutError):
                return await asyncio.wait_for(self._outputs.get(), _ALIVE_CHECK_S)
            if not self._engine.health().alive and self._outputs.empty():
                return Output((), finish="error", error=self._engine.health().error or "the engine stopped")

    def _text(self, output: Output) -> str:
        text = self._stops.feed(self._detokenizer.feed(output.tokens))
        if output.finish is None:
            return text
        return text + self._stops.feed(self._detokenizer.finish()) + self._stops.finish()

    def _end(self, output: Output) -> None:
        self._running = False
        self.tally.figures = output.figures
        if output.finish == "length" and not self._stops.stopped:
            self.finish = "length"
        elif output.finish == "error":
            self._figures.ended("failed")
            raise ApiError(500, f"The engine failed: {output.error}", kind="server_error", code="engine_failed")
        elif output.finish == "cancelled" and not self._stops.stopped:
            self._figures.ended("cancelled")
            raise unavailable("The node stopped before the answer was complete")
        self._figures.ended(self.finish)

    def _time(self, tokens: int) -> None:
        if not tokens:
            return
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        if self.tally.completion_tokens == 0:
            self._figures.first_token.observe(elapsed)
            return
        for _ in range(tokens):
            self._figures.between_tokens.observe(elapsed / tokens)
