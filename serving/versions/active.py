"""What the engine drafts with, by what it came to that, and since when."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

import structlog

from schemas.speculator.network import EagleDraft
from schemas.telemetry import spans
from schemas.telemetry.spans import Span
from schemas.telemetry.trace_context import version_context
from serving.engines.base import HotSwapEngine

log = structlog.get_logger()

PINNED = "pinned"
_SWAPS_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Swap:
    """A version that began to serve."""

    version: str
    time: float
    in_flight: int
    pause_ms: float


def _span(line: str, swap: Swap, role: str) -> Span:
    registered = version_context(line, swap.version)
    return Span(
        name="swap version",
        event="version_swapped",
        context=registered.child(),
        start=swap.time - swap.pause_ms / 1e3,
        end=swap.time,
        parent=registered.span_id,
        attributes={
            "line": line,
            "version": swap.version,
            "role": role,
            "in_flight": swap.in_flight,
            "pause_s": swap.pause_ms / 1e3,
        },
    )


class Seat:
    """The one version that serves."""

    def __init__(self, engine: HotSwapEngine) -> None:
        self._engine = engine
        self._swaps: deque[Swap] = deque(maxlen=_SWAPS_KEPT)
        self.turning = threading.RLock()
        """Held by whoever seats a version, or changes what a turn rests on."""
        self.version: str | None = None
        """None with the draft of day 0."""
        self.role: str | None = None
        """By what the version came to serve: the followed alias, ``canary`` or ``pinned``."""
        self.swapped = 0

    @property
    def swaps(self) -> tuple[Swap, ...]:
        """The newest swaps, oldest first; the last one says what is served since when."""
        return tuple(self._swaps.copy())

    def take(self, version: str, draft: EagleDraft, role: str) -> Swap:
        """Swap a version in between two verify steps; returns what that was like."""
        with self.turning:
            swapped = self._engine.swap(draft, version)
            swap = Swap(version, time.time(), swapped.in_flight, swapped.pause_ms)
            log.info("swapped", version=version, role=role, in_flight=swap.in_flight, pause_ms=swap.pause_ms)
            spans.record(_span(self._engine.line, swap, role))
            self.version, self.role = version, role
            self.swapped += 1
            self._swaps.append(swap)
            return swap
