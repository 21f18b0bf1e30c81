"""From chunks with features to chunks with a claim; while the store fails, little time is spent on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import structlog

from schemas.claim_store import ClaimStore, ClaimStoreError
from schemas.trace.record import Chunk
from serving.traces.chunks import without_features
from serving.traces.circuit_breaker import Breaker

log = structlog.get_logger()


class Cloakroom:
    """Takes the features off chunks. Blocks while the store is written to.

    Args:
        store: Where they go.
        breaker: Opens after failures in a row; while it is open, one chunk is tried now and then.
        clock: Monotonic seconds.
    """

    def __init__(self, store: ClaimStore, breaker: Breaker, clock: Callable[[], float]) -> None:
        self._store = store
        self._breaker = breaker
        self._clock = clock

    @property
    def state(self) -> str:
        """State of the breaker."""
        return self._breaker.state

    def check_in(self, chunk: Chunk) -> Chunk | None:
        """The chunk with a claim in place of its features; None if the store did not take them."""
        if not self._breaker.admits(self._clock()):
            return None
        before = self._breaker.state
        features = np.concatenate([r.features for r in chunk.verify_steps])
        try:
            claim = self._store.put(features, chunk.verify_steps[-1].time_us)
        except ClaimStoreError as error:
            self._breaker.failed(self._clock())
            if before == "closed" and self._breaker.state == "open":
                log.warning("trace_claims_failing", why=str(error))
            return None
        if before != "closed":
            log.info("trace_claims_recovered")
        self._breaker.succeeded()
        return Chunk(replace(chunk.envelope, claim=claim), tuple(map(without_features, chunk.verify_steps)))
