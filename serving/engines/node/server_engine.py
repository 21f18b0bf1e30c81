"""Engine of a server in another process: its state, and what does not depend on the kind of server.

Each server adds how it starts and how a version is swapped into it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from prometheus_client import Metric
from torch import Tensor

from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from serving.engines.base import EngineHealth, SpeculationFixedError, SwapResult
from serving.engines.node.server_client import ServerCounters, ServerError, ServerLoad
from serving.traces.accounting import TraceCounts
from serving.traces.circuit_breaker import CircuitState

WATCH_INTERVAL_S = 1.0
_NO_LOAD, _NO_COUNTERS = ServerLoad(0, 0), ServerCounters(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class ServerState:
    """The server at the last look."""

    is_up: bool = False
    load: ServerLoad = _NO_LOAD
    counters: ServerCounters = _NO_COUNTERS
    """Of the last look with an answer."""
    error: str | None = None


class ServerEngine(ABC):
    """A ``HotSwapEngine`` in another process. It reads the server's state every second, so that no caller waits for it.

    Args:
        name: Of the server's project, for messages.
        target: Fingerprint of the target.
        line: Speculator line of the drafts.
        version: The draft that the server starts with; empty if it is not known.
    """

    def __init__(self, name: str, target: str, line: str, version: str) -> None:
        self._name, self.target, self.line = name, target, line
        self._version, self._depth = version, 0
        self._d2t: Tensor | None = None
        """Draft vocabulary with which the server started, if it reads that only once."""
        self._error: str | None = None
        """Why the last swap failed."""
        self._lock = threading.Lock()
        """Held during a swap."""
        self.state = ServerState()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server-watch", daemon=True)

    @abstractmethod
    def start(self) -> None:
        """Start with a server that answers.

        Raises:
            ServerError: the server is unreachable or not supported.
        """

    @abstractmethod
    def _swap(self, weights: EagleDraft, version: str) -> SwapResult:
        """Replace the weights between two steps.

        Raises:
            ServerError: the swap failed; the message says whether the draft before still serves.
        """

    @abstractmethod
    def _look(self) -> tuple[ServerLoad, ServerCounters]:
        """Ask the server for its load and its counters.

        Raises:
            ServerError: it is unreachable.
        """

    def swap(self, draft: EagleDraft, version: str) -> SwapResult:
        """Replace the weights between two steps.

        Raises:
            ServerError: the swap failed; the message says whether the draft before still serves.
        """
        with self._lock:
            try:
                swapped = self._swap(draft, version)
            except ServerError as error:
                self._error = str(error)
                raise
            self._error = None
            return swapped

    def stop(self) -> None:
        """Stop watching the server; the server itself keeps running. A call that hangs ends with the process."""
        self._stopping.set()

    def check(self, draft: EagleDraft) -> None:
        """Draft once with the given weights, in this process.

        Raises:
            CheckpointError: the draft has another draft vocabulary than the server, which reads it once, or gives
                values that are not finite.
        """
        if self._d2t is not None and not torch.equal(draft.d2t, self._d2t):
            raise CheckpointError(
                f"the draft has another draft vocabulary than the one with which {self._name} started: restart the "
                "server, and set train.draft_vocab_min_coverage = 0 to keep one vocabulary"
            )
        shape = draft.shape
        with torch.inference_mode():
            hidden = draft.fuse(torch.ones(1, 1, shape.feature_width))
            row = torch.ones(1, 1, shape.hidden_size)
            value_BMTE = draft.project(row, hidden, torch.zeros(1, 1, dtype=torch.long)).v_BMTE
            # A token that attends only to itself gets its own value.
            attended = value_BMTE.repeat_interleave(shape.num_attention_heads // shape.num_key_value_heads, dim=1)
            logits = draft.logits(draft.finish(hidden, attended))
        if not torch.isfinite(logits).all():
            raise CheckpointError("the draft gives values that are not finite")

    def speculate(self, *, on: bool) -> None:
        """Do nothing: the server speculates from its start on, or never.

        Raises:
            SpeculationFixedError: ``on`` is False.
        """
        if not on:
            raise SpeculationFixedError(
                f"{self._name} cannot stop speculation while it runs: start the node with serve.speculate=false"
            )

    def health(self) -> EngineHealth:
        """Return the server's state at the last look."""
        state = self.state
        counters = state.counters
        return EngineHealth(
            alive=state.is_up,
            speculator=self._version,
            speculating=True,
            draft_depth=self._depth,
            expected_tokens_per_second=(),
            requests_running=state.load.running,
            requests_waiting=state.load.waiting,
            verify_steps=counters.verify_steps,
            draft_tokens=counters.draft_tokens,
            accepted_tokens=counters.accepted_tokens,
            output_tokens=counters.tokens,
            error=self._error or state.error,
        )

    @property
    def finished(self) -> int:
        """Requests that have ended."""
        return self.state.counters.requests

    @property
    def failed(self) -> int:
        """Zero: the servers do not count requests that ended with an error of their own."""
        return 0

    @property
    def circuit_breaker(self) -> CircuitState:
        """State of the circuit breaker of the broker, in the server's process."""
        return "open" if self.state.counters.circuit_breaker_open else "closed"

    def counts(self) -> TraceCounts:
        """Return the counts of trace rows."""
        rows = self.state.counters
        pending = max(0, rows.captured - rows.published - rows.dropped)
        return TraceCounts(
            rows.captured, rows.published, {"server": rows.dropped}, pending, 0, unsampled=rows.unsampled
        )

    def collect(self) -> Iterator[Metric]:
        """Yield no metrics: the plugin's are on the server's own ``/metrics``."""
        return iter(())

    def _watch(self) -> None:
        """Look once, and then every second."""
        self.read()
        self._thread.start()

    def read(self) -> None:
        """Read the state once."""
        try:
            load, counters = self._look()
        except ServerError as error:
            self.state = ServerState(load=self.state.load, counters=self.state.counters, error=str(error))
        else:
            self.state = ServerState(is_up=True, load=load, counters=counters)

    def _run(self) -> None:
        while not self._stopping.wait(WATCH_INTERVAL_S):
            self.read()
