"""vLLM's own server as an engine: versions are written to a folder, and loaded by our worker extension.

The workers read and check the files while steps continue, and load them between two steps: no request is paused longer
than the load takes. If it fails, the workers restore the version before. The call runs in the server, so a node that
dies leaves a working server.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from schemas.speculator.checkpoint import MANIFEST, CheckpointError, hash_file, write_checkpoint
from schemas.speculator.network import EagleDraft
from serving.engines.base import SwapResult
from serving.engines.node.command_line import DraftFolder
from serving.engines.node.server_client import ServerCounters, ServerError, ServerLoad
from serving.engines.node.server_engine import ServerEngine
from serving.engines.vllm.node.vllm_client import VllmClient

_POLL_S = 0.05


class VllmEngine(ServerEngine):
    """vLLM's server as an engine.

    Args:
        server: Need not run yet.
        target: Fingerprint of the target.
        line: Speculator line of the drafts.
        draft: The version that the server starts with; None without speculation.
        depth: Draft tokens, one after the other.
        folder: For versions on their way to the server, which reads them there.
        timeout_s: Timeout of a swap.
        is_own: Whether this node starts the server; another one may draft with other weights and another depth.
    """

    def __init__(
        self,
        server: VllmClient,
        target: str,
        line: str,
        draft: DraftFolder | None,
        depth: int,
        folder: Path,
        timeout_s: float,
        *,
        is_own: bool = True,
    ) -> None:
        super().__init__("vLLM", target, line, draft.version if draft else "")
        self._draft, self._is_own = draft, is_own
        self._server, self._depth, self._folder, self._timeout_s = server, depth, folder, timeout_s

    def start(self) -> None:
        """Start with a server that answers.

        Raises:
            ServerError: the server is unreachable or not supported.
        """
        if self._draft and self._is_own:
            self._version = self._server.start(self._draft)
        elif self._draft:
            try:
                self._version, self._depth = self._server.attach(self._draft)
            except ServerError as error:
                raise ServerError(
                    f"{error}; vllm.url needs a server with our extension: docs/guides/vllm.md#attach-to-a-server"
                ) from error
        self._watch()

    def _swap(self, weights: EagleDraft, version: str) -> SwapResult:
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            write_checkpoint(weights, self._folder, self.target, line=self.line)
            self._wait_read(hash_file(self._folder / MANIFEST))
            in_flight = self._server.look()[0].running
            seconds = self._server.load(version)
        except (ServerError, CheckpointError, OSError) as error:
            raise ServerError(f"version {version} is not served: {error}") from error
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._version = version
        return SwapResult(version, in_flight, seconds * 1e3)

    def _wait_read(self, digest: str) -> None:
        """Block until the workers have read the files whose manifest has this SHA-256."""
        deadline = time.monotonic() + self._timeout_s
        while not self._server.read(self._folder, digest):
            if time.monotonic() > deadline:
                raise ServerError("its files were not read in time (vllm.timeout)")
            time.sleep(_POLL_S)

    def _look(self) -> tuple[ServerLoad, ServerCounters]:
        return self._server.look()
