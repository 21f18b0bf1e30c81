"""An answer in the making: the engine's outputs, brought to the event loop and turned into text."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client import Counter as PrometheusCounter

from serving.engines.base import Engine, EngineFullError, Output, Request, RequestStats
from serving.http.requests import ApiError, unavailable
from serving.http.responses import Cost, FinishReason
from serving.http.transcript import Piece, Transcript, joined

_ALIVE_CHECK_S = 5.0
_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
_NO_FIGURES = RequestStats(0, 0, 0, ())


class RequestFigures:
    """How requests went, each choice as one of its own. Only the event loop's thread counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._outcomes: Counter[str] = Counter()
        self._requests = PrometheusCounter(
            "aurora_serve_requests", "Choices of requests by outcome.", ["outcome"], registry=registry
        )
        self.first_token = Histogram(
            "aurora_serve_first_token_seconds",
            "From the request to its first token.",
            buckets=_BUCKETS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "aurora_serve_between_tokens_seconds",
            "Time per output token after the first; a verify step's time is shared by its tokens.",
            buckets=_BUCKETS,
            registry=registry,
        )

    def ended(self, outcome: str) -> None:
        """Count a choice: stop, length, cancelled, failed; or a request that was refused before it began."""
        self._outcomes[outcome] += 1
        self._requests.labels(outcome).inc()

    @property
    def finished(self) -> int:
        """Choices that were answered."""
        return self._outcomes["stop"] + self._outcomes["length"]

    @property
    def failed(self) -> int:
        """Choices that ended by a fault of the node."""
        return self._outcomes["failed"]


@dataclass(slots=True)
class Choice:
    """One sequence of a request."""

    index: int
    request: Request
    transcript: Transcript
    finish: FinishReason | None = None
    """None until it has ended."""
    error_type: str | None = None
    """Class of the failure of the node that ended it; None without one."""
    figures: RequestStats = _NO_FIGURES
    """How it was decoded, known when it has ended."""
    last: float = field(default_factory=time.perf_counter)
    """When it began, then when its newest tokens came."""

    @property
    def cost(self) -> Cost:
        """What it cost."""
        return Cost(self.transcript.count, self.figures)

    def read(self, output: Output) -> Piece:
        """What an output adds to the text."""
        piece = self.transcript.feed(output.tokens, output.logprobs)
        return piece if output.finish is None else joined([piece, self.transcript.finish()])


class Generation:
    """The choices of one request in the engine. ``pieces`` can be read once."""

    def __init__(
        self,
        engine: Engine,
        choices: Sequence[Choice],
        figures: RequestFigures,
        tell: Callable[[Sequence[Choice]], None] | None = None,
    ) -> None:
        """Begin nothing yet.

        Args:
            engine: What answers.
            choices: The sequences.
            figures: Where they are counted.
            tell: Called once, when nobody waits for the answer any more.
        """
        self.choices = tuple(choices)
        self._tell = tell
        self._engine = engine
        self._figures = figures
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        self._running: set[int] = set()

    def submit(self) -> None:
        """Queue all choices in the engine, or none.

        Raises:
            ApiError: the engine is full (429) or does not run (503).
        """
        if not self._engine.health().alive:
            self._figures.ended("failed")
            raise unavailable("The engine is not running")
        try:
            for choice in self.choices:
                self._engine.submit(choice.request, partial(self._hand_over, choice.index))
                self._running.add(choice.index)
        except EngineFullError as error:
            self.abandon()
            message = f"The engine is full, try again later: {error}"
            raise ApiError(429, message, kind="rate_limit_error", code="engine_full") from error

    async def pieces(self) -> AsyncGenerator[tuple[Choice, Piece], None]:
        """Pieces of all choices as they come, each with its choice; a choice that ends has its ``finish`` by then.

        Raises:
            ApiError: the engine failed or stopped in mid-answer.
        """
        while self._running:
            index, output = await self._next()
            choice, stopped = self.choices[index], self.choices[index].transcript.stopped
            piece = Piece() if stopped else self._read(choice, output)
            if output.finish is not None:
                self._end(choice, output)
            elif choice.transcript.stopped and not stopped:
                self._engine.cancel(choice.request.id)
            if piece or choice.finish is not None:
                yield choice, piece

    def abandon(self) -> None:
        """Nobody waits for the answer any more; what still runs of it is ended."""
        running, self._running = self._running, set()
        for index in running:
            self._figures.ended("cancelled")
            self._engine.cancel(self.choices[index].request.id)
        tell, self._tell = self._tell, None
        if tell is not None:
            tell(self.choices)

    def _hand_over(self, index: int, output: Output) -> None:
        """Called on the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: the server has gone, and nobody waits
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, (index, output))

    async def _next(self) -> tuple[int, Output]:
        while True:
            with suppress(TimeoutError):
                return await asyncio.wait_for(self._outputs.get(), _ALIVE_CHECK_S)
            health = self._engine.health()
            if not health.alive and self._outputs.empty():
                return min(self._running), Output((), finish="error", error=health.error or "the engine stopped")

    def _read(self, choice: Choice, output: Output) -> Piece:
        before = choice.transcript.count
        piece = choice.read(output)
        self._time(choice, before, choice.transcript.count - before)
        return piece

    def _end(self, choice: Choice, output: Output) -> None:
        self._running.remove(choice.index)
        choice.figures = output.stats or choice.figures
        stopped = choice.transcript.stopped
        if output.finish == "error":
            self._figures.ended("failed")
            choice.error_type = "engine_failed"
            raise ApiError(500, f"The engine failed: {output.error}", kind="server_error", code="engine_failed")
        if output.finish == "cancelled" and not stopped:
            self._figures.ended("cancelled")
            choice.error_type = "node_stopped"
            raise unavailable("The node stopped before the answer was complete")
        choice.finish = "length" if output.finish == "length" and not stopped else "stop"
        self._figures.ended(choice.finish)

    def _time(self, choice: Choice, before: int, tokens: int) -> None:
        if not tokens:
            return
        now = time.perf_counter()
        elapsed, choice.last = now - choice.last, now
        if before == 0:
            self._figures.first_token.observe(elapsed)
            return
        for _ in range(tokens):
            self._figures.between_tokens.observe(elapsed / tokens)
