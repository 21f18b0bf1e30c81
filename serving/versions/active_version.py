"""Active version: the version that the engine drafts with, the role that activated it, and the history of swaps."""

from __future__ import annotations

import threading
import time
from collections import deque

import structlog

from schemas.speculator.network import EagleDraft
from schemas.status import SwapStatus
from schemas.telemetry import spans
from schemas.telemetry.spans import Span
from schemas.telemetry.trace_context import version_context
from serving.engines.base import HotSwapEngine

log = structlog.get_logger()

PINNED = "pinned"
_SWAPS_KEPT = 1000


class ActiveVersion:
    """The version that serves."""

    def __init__(self, engine: HotSwapEngine) -> None:
        self._engine = engine
        self._swaps: deque[SwapStatus] = deque(maxlen=_SWAPS_KEPT)
        self.lock = threading.RLock()
        """Held while a version is activated, and while the state that selects it changes."""
        self.version: str | None = None
        """None with the day-0 draft."""
        self.role: str | None = None
        """What selected the version: the followed alias, ``canary`` or ``pinned``; None with the day-0 draft."""
        self.swap_count = 0

    @property
    def swaps(self) -> tuple[SwapStatus, ...]:
        """The newest swaps, oldest first; the last one is the swap to the active version."""
        return tuple(self._swaps.copy())

    def swap(self, version: str, draft: EagleDraft, role: str) -> SwapStatus:
        """Swap a version in between two verify steps."""
        with self.lock:
            swapped = self._engine.swap(draft, version)
            swap = SwapStatus(version=version, time=time.time(), in_flight=swapped.in_flight, pause_ms=swapped.pause_ms)
            log.info(
                "version_activated",
                line=self._engine.line,
                version=version,
                role=role,
                in_flight=swap.in_flight,
                pause_ms=swap.pause_ms,
            )
            spans.record(_span(self._engine.line, swap, role))
            self.version, self.role = version, role
            self.swap_count += 1
            self._swaps.append(swap)
            return swap


def _span(line: str, swap: SwapStatus, role: str) -> Span:
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
