"""Feature offload: moves the features of a chunk to the object store, and leaves a claim check in the chunk."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import structlog

from schemas.claim_store import ClaimStore, ClaimStoreError
from schemas.settings import Traces
from schemas.trace.record import Chunk
from serving.traces.chunks import drop_features
from serving.traces.circuit_breaker import CircuitBreaker, CircuitState

log = structlog.get_logger()


class FeatureOffload:
    """Writes features to the store; blocks meanwhile. While the store fails, the circuit breaker limits the attempts.

    Args:
        traces: The store, and the limits of the circuit breaker.
        clock: Monotonic seconds.
    """

    def __init__(self, traces: Traces, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = ClaimStore(traces)
        self._breaker = CircuitBreaker(traces.circuit_breaker_failures, traces.circuit_breaker_probe_interval)
        self._clock = clock

    @property
    def state(self) -> CircuitState:
        """State of the circuit breaker."""
        return self._breaker.state

    def offload(self, chunk: Chunk) -> Chunk | None:
        """Return the chunk with a claim check in place of its features; None if they could not be stored."""
        if not self._breaker.allows(self._clock()):
            return None
        before = self._breaker.state
        features = np.concatenate([step.features for step in chunk.verify_steps])
        try:
            claim = self._store.put(features, chunk.verify_steps[-1].time_us)
        except ClaimStoreError as error:
            self._breaker.record_failure(self._clock())
            if before == "closed" and self._breaker.state == "open":
                log.warning("offload_circuit_breaker_opened", why=str(error))
            return None
        if before != "closed":
            log.info("offload_circuit_breaker_closed")
        self._breaker.record_success()
        return Chunk(replace(chunk.envelope, claim=claim), tuple(map(drop_features, chunk.verify_steps)))
