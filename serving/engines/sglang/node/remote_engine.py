"""Remote engine: SGLang's own server as a ``HotSwapEngine``, with versions swapped in by HTTP.

A swap is: pause in place, begin, update, end, compare checksums, resume. Requests are paused meanwhile; none is lost.
Afterwards the server's checksums are compared with those of the tensors that were sent. If anything fails, the draft
before is restored, and the error says so.

A node that dies during a swap leaves a paused server with an open update. ``_repair`` closes the update and resumes the
requests; it runs first whenever a node starts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import structlog
import torch
from prometheus_client import Metric
from torch import Tensor

from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from serving.engines.base import EngineHealth, SpeculationFixedError, SwapResult
from serving.engines.sglang.node.client import ServerCounters, ServerLoad, SglangError, SglangServer
from serving.engines.sglang.node.weights import (
    SCHEMES,
    ChecksumScheme,
    ExpectedChecksums,
    compare_checksums,
    draft_tensors,
    serialize,
    serialize_shared,
)
from serving.traces.accounting import TraceCounts
from serving.traces.circuit_breaker import CircuitState

log = structlog.get_logger()

WATCH_INTERVAL_S = 1.0
_RESUME_TRIES = 3
_RETRY_S = 1.0
_NO_LOAD, _NO_COUNTERS = ServerLoad(0, 0), ServerCounters(0, 0, 0, 0, 0, 0, 0, 0)


class ServedDraft:
    """A draft by its version.

    Args:
        version: Its name.
        tensors: From ``weights.draft_tensors``.
    """

    def __init__(self, version: str, tensors: Mapping[str, Tensor]) -> None:
        self.version, self.tensors = version, tensors
        self.checksums = ExpectedChecksums(tensors)


@dataclass(frozen=True, slots=True)
class ServerState:
    """The server at the last look."""

    is_up: bool = False
    load: ServerLoad = _NO_LOAD
    counters: ServerCounters = _NO_COUNTERS
    """Of the last look with an answer."""
    error: str | None = None


class ServerWatch:
    """Reads the state of a server every second, so that no caller waits for it. Also the ``TraceSource`` of the plugin.

    The plugin's metrics are on the server's own ``/metrics``; they are not exported a second time.
    """

    def __init__(self, server: SglangServer) -> None:
        self._server = server
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sglang-watch", daemon=True)
        self.state = ServerState()

    def start(self) -> None:
        """Start to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Stop; a call that hangs ends with the process."""
        self._stopping.set()

    def read(self) -> None:
        """Read the state once."""
        try:
            self.state = ServerState(is_up=True, load=self._server.load(), counters=self._server.counters())
        except SglangError as error:
            self.state = ServerState(load=self.state.load, counters=self.state.counters, error=str(error))

    @property
    def circuit_breaker(self) -> CircuitState:
        """State of the circuit breaker of the broker."""
        return "open" if self.state.counters.circuit_breaker_open else "closed"

    def counts(self) -> TraceCounts:
        """Return the counts of rows."""
        rows = self.state.counters
        pending = max(0, rows.captured - rows.published - rows.dropped)
        return TraceCounts(rows.captured, rows.published, {"server": rows.dropped}, pending, 0, rows.unsampled)

    def collect(self) -> Iterator[Metric]:
        """Yield no metrics."""
        return iter(())

    def _run(self) -> None:
        while not self._stopping.wait(WATCH_INTERVAL_S):
            self.read()


class RemoteEngine:
    """A ``HotSwapEngine`` in another process.

    Args:
        server: Need not run yet.
        target: Fingerprint of the target.
        line: Speculator line of the drafts.
        served: The draft that the server starts with; None if it is not known.
        shares_memory: Whether all its processes are on this machine, and can take weights from shared memory.
    """

    def __init__(
        self,
        server: SglangServer,
        target: str,
        line: str,
        served: ServedDraft | None,
        *,
        shares_memory: bool = False,
    ) -> None:
        self.target, self.line = target, line
        self._server, self._served, self._shares_memory = server, served, shares_memory
        self.watch = ServerWatch(server)
        self._version = served.version if served else ""
        self._ranks, self._depth = 1, 0
        self._schemes: tuple[ChecksumScheme, ...] = SCHEMES
        """Checksum schemes of the server; one, once it is known."""
        self._lock = threading.Lock()
        self._needs_repair = True
        """Requests may be paused, or an update may be open."""
        self._error: str | None = None

    def start(self) -> None:
        """Start with a server that answers.

        Raises:
            SglangError: the server is unreachable or not supported.
        """
        info = self._server.info()
        if info.replicas > 1:
            raise SglangError("a server with data parallelism is not supported: start one per replica (--dp-size 1)")
        self._ranks, self._depth, self._version = info.ranks, info.depth, info.weight_version
        with self._lock:
            self._repair()
            if self._served:
                self._differing(self._served)  # learns the server's checksum scheme before the first swap
        self.watch.read()
        self.watch.start()

    def stop(self) -> None:
        """Stop watching the server; the server itself keeps running."""
        self.watch.stop()

    def check(self, draft: EagleDraft) -> None:
        """Draft once with the given weights, in this process.

        Raises:
            CheckpointError: the draft gives values that are not finite.
        """
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

    def swap(self, draft: EagleDraft, version: str) -> SwapResult:
        """Replace the weights while requests are paused; no pause if the server holds them already.

        Raises:
            SglangError: the swap failed; the message says whether the draft before still serves.
        """
        tensors = draft_tensors(draft)
        with self._lock:
            try:
                swapped = self._swap(ServedDraft(version, tensors))
            except SglangError as error:
                self._error = str(error)
                raise
            self._error = None
            return swapped

    def speculate(self, *, on: bool) -> None:
        """Do nothing: SGLang speculates from its start on, or never.

        Raises:
            SpeculationFixedError: ``on`` is False.
        """
        if not on:
            raise SpeculationFixedError(
                "SGLang cannot stop speculation while it runs: start the node with serve.speculate=false"
            )

    def health(self) -> EngineHealth:
        """Return the server's state at the last look; requests count when they have ended."""
        state = self.watch.state
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
            draft_tokens=counters.verify_steps * self._depth,
            # Of a request's tokens the first comes from its prompt, and each verify step gives one bonus token.
            accepted_tokens=max(0, counters.tokens - counters.requests - counters.verify_steps),
            output_tokens=counters.tokens,
            error=self._error or state.error,
        )

    @property
    def finished(self) -> int:
        """Requests that have ended."""
        return self.watch.state.counters.requests

    @property
    def failed(self) -> int:
        """Zero: SGLang does not count requests that ended with an error of its own."""
        return 0

    def _swap(self, draft: ServedDraft) -> SwapResult:
        if self._needs_repair:
            self._repair()
        if not self._differing(draft):
            self._server.set_version(draft.version)
            self._set_served(draft)
            return SwapResult(draft.version, 0, 0.0)
        contents, in_flight = self._contents(draft), self._server.load().running
        start = time.perf_counter()
        self._needs_repair = True
        try:
            self._pause(draft)
            self._update_or_restore(draft, contents)
        finally:
            self._resume()
        self._set_served(draft)
        return SwapResult(draft.version, in_flight, (time.perf_counter() - start) * 1e3)

    def _contents(self, draft: ServedDraft) -> list[str]:
        """Return the serialized draft for each rank."""
        if self._shares_memory:
            try:
                return [serialize_shared(draft.tensors) for _ in range(self._ranks)]
            except RuntimeError as error:
                log.warning("sglang_shared_memory_failed", why=str(error))
                self._shares_memory = False
        return [serialize(draft.tensors)] * self._ranks

    def _pause(self, draft: ServedDraft) -> None:
        try:
            self._server.pause()
        except SglangError as error:
            # Nothing has changed, and a call about an update would now wait for every running request.
            raise SglangError(f"{_failure(draft, error)}; version {self._version} still serves") from error

    def _update_or_restore(self, draft: ServedDraft, contents: Sequence[str]) -> None:
        try:
            self._update(draft, contents)
        except SglangError as error:
            raise self._restore(draft, error) from error

    def _update(self, draft: ServedDraft, contents: Sequence[str]) -> None:
        """Update the draft of a paused server, and verify its checksums."""
        self._server.begin_update()
        self._server.update(contents, draft.version)
        if not self._server.end_update():
            raise SglangError("another client has closed the update")
        if wrong := self._differing(draft):
            raise SglangError(f"the server holds other weights than were sent: {', '.join(wrong)}")

    def _restore(self, draft: ServedDraft, error: SglangError) -> SglangError:
        """Restore the draft before; return the error with the outcome."""
        served, failure = self._served, _failure(draft, error)
        log.warning("sglang_update_failed", version=draft.version, why=str(error))
        self._shares_memory = False  # shared memory that is not taken leaks: not once per try
        try:
            self._server.end_update()
            if served is None:
                return SglangError(f"{failure}; it is not known which draft serves now")
            if self._differing(served):
                self._update(served, self._contents(served))
            self._server.set_version(served.version)
        except SglangError as second:
            return SglangError(f"{failure}; the version before could not be restored: {second}")
        return SglangError(f"{failure}; version {served.version} still serves")

    def _resume(self) -> None:
        """Resume the requests; retry, since they are paused as long as it fails."""
        for left in reversed(range(_RESUME_TRIES)):
            try:
                self._server.resume()
            except SglangError as error:
                log.warning("sglang_resume_failed", why=str(error))
                if not left:
                    raise
                time.sleep(_RETRY_S)
            else:
                self._needs_repair = False
                return

    def _repair(self) -> None:
        """Close an update that a dead node left open. Pause first: else closing it waits for all running requests."""
        self._server.pause()
        try:
            if self._server.end_update():
                log.warning("sglang_repaired", why="an update was open: the node that began it has died")
        finally:
            self._resume()

    def _differing(self, draft: ServedDraft) -> tuple[str, ...]:
        """Return the tensors that the server holds otherwise than the draft."""
        difference = compare_checksums(self._server.checksums(), draft.checksums, self._schemes)
        if difference.scheme:
            self._schemes = (difference.scheme,)
        return difference.names

    def _set_served(self, draft: ServedDraft) -> None:
        self._served, self._version = draft, draft.version


def _failure(draft: ServedDraft, error: SglangError) -> str:
    return f"version {draft.version} is not served: {error}"
