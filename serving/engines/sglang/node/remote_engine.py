"""Remote engine: SGLang's own server as a ``HotSwapEngine``, with versions swapped in by HTTP.

A swap is: pause in place, begin, update, end, compare checksums, resume. Requests are paused meanwhile; none is lost.
Afterwards the server's checksums are compared with those of the tensors that were sent. If anything fails, the draft
before is restored, and the error says so.

A node that dies during a swap leaves a paused server with an open update. ``_repair`` closes the update and resumes the
requests; it runs first whenever a node starts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from schemas.speculator.checkpoint import CheckpointError, read_tensor
from schemas.speculator.network import EagleDraft
from serving.engines.base import SwapResult
from serving.engines.node.server_client import ServerCounters, ServerError, ServerLoad
from serving.engines.node.server_engine import ServerEngine
from serving.engines.sglang.node.client import SglangServer
from serving.engines.sglang.node.weights import (
    SCHEMES,
    ChecksumScheme,
    ExpectedChecksums,
    compare_checksums,
    draft_tensors,
    serialize,
    serialize_shared,
)

log = structlog.get_logger()

_RESUME_TRIES = 3
_RETRY_S = 1.0


class ServedDraft:
    """A draft by its version.

    Args:
        version: Its name.
        draft: Its weights.
    """

    def __init__(self, version: str, draft: EagleDraft) -> None:
        self.version, self.tensors = version, draft_tensors(draft)
        self.checksums = ExpectedChecksums(self.tensors, draft.shape.num_key_value_heads)


class RemoteEngine(ServerEngine):
    """SGLang's server as an engine; requests count when they have ended.

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
        super().__init__("SGLang", target, line, served.version if served else "")
        self._server, self._served, self._shares_memory = server, served, shares_memory
        self._ranks = 1
        self._schemes: tuple[ChecksumScheme, ...] = SCHEMES
        """Checksum schemes of the server; one, once it is known."""
        self._needs_repair = True
        """Requests may be paused, or an update may be open."""

    def start(self) -> None:
        """Start with a server that answers.

        Raises:
            ServerError: the server is unreachable or not supported, or its draft cannot be read.
        """
        info = self._server.info()
        if info.replicas > 1:
            raise ServerError("a server with data parallelism is not supported: start one per replica (--dp-size 1)")
        self._ranks, self._depth, self._version = info.ranks, info.depth, info.weight_version
        if info.draft:
            try:
                self._d2t = read_tensor(Path(info.draft), "d2t")
            except CheckpointError as error:
                raise ServerError(f"--speculative-draft-model-path is not readable: {error}") from error
        with self._lock:
            self._repair()
            if self._served:
                self._differing(self._served)  # learns the server's checksum scheme before the first swap
        self._watch()

    def _look(self) -> tuple[ServerLoad, ServerCounters]:
        return self._server.load(), self._server.counters(self._depth)

    def _swap(self, weights: EagleDraft, version: str) -> SwapResult:
        """Replace the weights while requests are paused; no pause if the server holds them already."""
        draft = ServedDraft(version, weights)
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
        except ServerError as error:
            # Nothing has changed, and a call about an update would now wait for every running request.
            raise ServerError(f"{_failure(draft, error)}; version {self._version} still serves") from error

    def _update_or_restore(self, draft: ServedDraft, contents: Sequence[str]) -> None:
        try:
            self._update(draft, contents)
        except ServerError as error:
            raise self._restore(draft, error) from error

    def _update(self, draft: ServedDraft, contents: Sequence[str]) -> None:
        """Update the draft of a paused server, and verify its checksums."""
        self._server.begin_update()
        self._server.update(contents, draft.version)
        if not self._server.end_update():
            raise ServerError("another client has closed the update")
        if wrong := self._differing(draft):
            raise ServerError(f"the server holds other weights than were sent: {', '.join(wrong)}")

    def _restore(self, draft: ServedDraft, error: ServerError) -> ServerError:
        """Restore the draft before; return the error with the outcome."""
        served, failure = self._served, _failure(draft, error)
        log.warning("sglang_update_failed", version=draft.version, why=str(error))
        self._shares_memory = False  # shared memory that is not taken leaks: not once per try
        try:
            self._server.end_update()
            if served is None:
                return ServerError(f"{failure}; it is not known which draft serves now")
            if self._differing(served):
                self._update(served, self._contents(served))
            self._server.set_version(served.version)
        except ServerError as second:
            return ServerError(f"{failure}; the version before could not be restored: {second}")
        return ServerError(f"{failure}; version {served.version} still serves")

    def _resume(self) -> None:
        """Resume the requests; retry, since they are paused as long as it fails."""
        for left in reversed(range(_RESUME_TRIES)):
            try:
                self._server.resume()
            except ServerError as error:
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
        try:
            difference = compare_checksums(self._server.checksums(), draft.checksums, self._schemes)
        except ValueError as error:
            raise ServerError(f"the weights cannot be compared: {error}") from error
        if difference.scheme:
            self._schemes = (difference.scheme,)
        return difference.names

    def _set_served(self, draft: ServedDraft) -> None:
        self._served, self._version = draft, draft.version


def _failure(draft: ServedDraft, error: ServerError) -> str:
    return f"version {draft.version} is not served: {error}"
