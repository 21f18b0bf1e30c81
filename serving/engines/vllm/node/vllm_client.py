"""HTTP client of vLLM's own server: its metrics, and the methods of our worker extension."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from serving.engines.node.command_line import DraftFolder
from serving.engines.node.server_client import ServerClient, ServerCounters, ServerError, ServerLoad

_LOAD = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_COUNTERS = (
    "vllm:request_success_total",
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:generation_tokens_total",
    "aurora_serve_trace_rows_captured_total",
    "aurora_serve_trace_rows_published_total",
    "aurora_serve_trace_rows_dropped_total",
    "aurora_serve_trace_requests_unsampled_total",
    "aurora_vllm_trace_circuit_breaker_open",
)
"""Metrics, in the order of the fields of ``ServerCounters``."""


class VllmClient(ServerClient):
    """One server; usable from several threads.

    Every method raises ``ServerError``.

    Args:
        url: Address.
        key: ``vllm.api_key``.
        timeout_s: Timeout of a weight update.
    """

    def __init__(self, url: str, key: SecretStr, timeout_s: float) -> None:
        super().__init__(url, key, timeout_s, "vllm.api_key")

    def look(self) -> tuple[ServerLoad, ServerCounters]:
        """Return the number of requests, and the counters."""
        running, waiting, *counters = self.read_metrics((*_LOAD, *_COUNTERS))
        return ServerLoad(running, waiting), ServerCounters(*counters)

    def start(self, draft: DraftFolder) -> str:
        """Start to record and to accept versions; return the version that drafts.

        Args:
            draft: The version with which the server has started, as it was registered.
        """
        return str(self._call_workers("aurora_start", str(draft.folder), draft.version)[0]["version"])

    def attach(self, draft: DraftFolder) -> tuple[str, int]:
        """Start to record and to accept versions in a server that somebody else has started.

        Args:
            draft: The version with which the line begins.

        Returns:
            The version that drafts, and the depth of its drafts.
        """
        answer = self._call_workers("aurora_attach", str(draft.folder), draft.version)[0]
        return str(answer["version"]), int(answer["depth"])

    def read(self, folder: Path, digest: str) -> bool:
        """Let the workers read a version's files; return whether all have read them. Call it until they have."""
        answers = self._call_workers("aurora_read", str(folder), digest)
        return all(answer["is_read"] for answer in answers)

    def load(self, version: str) -> float:
        """Load the version that was read between two steps; return the seconds without a step."""
        return max(float(answer["seconds"]) for answer in self._call_workers("aurora_load", version))

    def _call_workers(self, method: str, *arguments: str) -> Sequence[dict[str, Any]]:
        """Return the answers of all workers, which run the method between two steps."""
        body = {"method": method, "args": list(arguments), "timeout": self._timeout_s}
        answers: list[dict[str, Any]] = self._json("POST", "/collective_rpc", body).get("results", [])
        if not answers:
            raise ServerError(f"{self.url}/collective_rpc: no worker has answered {method}")
        if why := next((answer["why"] for answer in answers if answer.get("why")), None):
            raise ServerError(str(why))
        return answers
