"""Active version: the version that the engine drafts with, the role that activated it, and the history of swaps.

A swap that fails keeps the draft before. It is tried again after a delay that grows with each failure: an engine that
is restarting takes the version later, and one that cannot take it is left alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from schemas.speculator.network import EagleDraft
from schemas.status import SwapStatus
from schemas.telemetry import spans
from schemas.telemetry.spans import Span
from schemas.telemetry.trace_context import version_context
from serving.engines.base import HotSwapEngine

log = structlog.get_logger()

PINNED = "pinned"
MAX_RETRY_DELAY_S = 600.0
_SWAPS_KEPT = 1000


@dataclass(frozen=True, slots=True)
class FailedSwap:
    """Swaps to one version that failed, without a swap in between."""

    version: str
    failures: int
    retry_at: float
    """Monotonic seconds."""
    why: str
    """Why the last one failed."""


class ActiveVersion:
    """The version that serves.

    Args:
        engine: Drafts with it.
        retry_s: Delay after the first failure of a swap; each further one doubles it.
        monotonic: Clock of the delays, in seconds.
    """

    def __init__(self, engine: HotSwapEngine, retry_s: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._retry_s, self._monotonic = engine, retry_s, monotonic
        self._swaps: deque[SwapStatus] = deque(maxlen=_SWAPS_KEPT)
        self.lock = threading.RLock()
        """Held while a version is activated, and while the state that selects it changes."""
        self.version: str | None = None
        """None with the day-0 draft."""
        self.role: str | None = None
        """What selected the version: the followed alias, ``canary``, ``previous`` or ``pinned``; None with the day-0
        draft."""
        self.swap_count = self.failure_count = 0
        self.failed: FailedSwap | None = None
        """The swap that is to be tried again."""

    @property
    def swaps(self) -> tuple[SwapStatus, ...]:
        """The newest swaps, oldest first; the last one is the swap to the active version."""
        return tuple(self._swaps.copy())

    def is_delayed(self, version: str | None) -> bool:
        """Return whether the swap to this version failed a short time ago."""
        failed = self.failed
        return failed is not None and failed.version == version and self._monotonic() < failed.retry_at

    def try_swap(self, version: str, draft: EagleDraft, role: str) -> bool:
        """Swap a version in, unless it is delayed; return whether it is active.

        A failure is counted. It is logged if the one before was of another version.
        """
        with self.lock:
            if self.is_delayed(version):
                return False
            try:
                self.swap(version, draft, role)
            except Exception as error:
                # Whatever failed, the engine keeps its draft, and the next try follows.
                if self.failed is None or self.failed.version != version:
                    log.warning("swap_failed", version=version, exc_info=True)
                self._record_failure(version, str(error) or type(error).__name__)
                return False
            return True

    def _record_failure(self, version: str, error: str) -> None:
        before = self.failed.failures if self.failed and self.failed.version == version else 0
        delay_s = min(self._retry_s * 2.0 ** min(before, 16), max(MAX_RETRY_DELAY_S, self._retry_s))
        self.failure_count += 1
        why = f"the swap to version {version} fails: {error}"
        self.failed = FailedSwap(version, before + 1, self._monotonic() + delay_s, why)

    def swap(self, version: str, draft: EagleDraft, role: str) -> SwapStatus:
        """Swap a version in between two verify steps. The engine's error is the caller's."""
        with self.lock:
            swapped = self._engine.swap(draft, version)
            self.failed = None
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
