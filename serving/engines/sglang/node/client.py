"""HTTP client of SGLang's own server: the part of its interface that a node uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from schemas.speculator.layouts import Shard
from serving.engines.node.server_client import (
    QUERY_TIMEOUT_S,
    CallRejectedError,
    ServerClient,
    ServerCounters,
    ServerLoad,
)
from serving.engines.sglang.node.weights import RankChecksums

_SHARED = ["embed_tokens"]
"""The target's embeddings, which a draft uses too: large, and never changed."""

_ENDED = ("sglang:num_requests_total", "sglang:spec_verify_calls_total", "sglang:generation_tokens_total")
_DRAFTED = "aurora_sglang_draft_tokens_total"
_TRACES = (
    "aurora_serve_trace_rows_captured_total",
    "aurora_serve_trace_rows_published_total",
    "aurora_serve_trace_rows_dropped_total",
    "aurora_serve_trace_requests_unsampled_total",
    "aurora_sglang_trace_circuit_breaker_open",
)
"""Metrics of our plugin, in the order of the last fields of ``ServerCounters``."""


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Configuration of a running server."""

    version: str
    """Of SGLang."""
    weight_version: str
    draft: str | None
    """Its ``--speculative-draft-model-path``."""
    ranks: int
    """Tensor-parallel processes."""
    replicas: int
    """Data-parallel replicas."""
    depth: int
    """Draft tokens, one after the other."""


class SglangServer(ServerClient):
    """One server; usable from several threads.

    Every method raises ``ServerError``.

    Args:
        url: Address.
        key: Its ``--admin-api-key``, or its ``--api-key``; empty if it has neither.
        timeout_s: Timeout of a weight update.
    """

    def __init__(self, url: str, key: SecretStr, timeout_s: float) -> None:
        super().__init__(url, key, timeout_s, "sglang.api_key")

    def info(self) -> ServerInfo:
        """Return the server's configuration."""
        info = self._json("GET", "/server_info", timeout=QUERY_TIMEOUT_S)
        # Only this endpoint shows the version after an update.
        version = str(self._json("GET", "/model_info", timeout=QUERY_TIMEOUT_S).get("weight_version"))
        return ServerInfo(
            version=str(info.get("version")),
            weight_version=version,
            draft=info.get("speculative_draft_model_path"),
            ranks=int(info.get("tp_size") or 1),
            replicas=int(info.get("dp_size") or 1),
            depth=int(info.get("speculative_num_steps") or 0),
        )

    def load(self) -> ServerLoad:
        """Return the number of requests."""
        replicas = self._json("GET", "/v1/loads", timeout=QUERY_TIMEOUT_S).get("loads", [])
        running, waiting = (
            sum(int(one[name]) for one in replicas) for name in ("num_running_reqs", "num_waiting_reqs")
        )
        return ServerLoad(running, waiting)

    def counters(self, depth: int) -> ServerCounters:
        """Return the counters of ended requests; all 0 on a server without ``--enable-metrics``.

        Args:
            depth: Maximum number of draft tokens of a verify step: as many are counted if our plugin counts none.
        """
        requests, verify_steps, tokens, drafted, *traces = self.read_metrics((*_ENDED, _DRAFTED, *_TRACES))
        # Of a request's tokens the first comes from its prompt, and each verify step gives one bonus token.
        accepted = max(0, tokens - requests - verify_steps)
        return ServerCounters(requests, verify_steps, drafted or verify_steps * depth, accepted, tokens, *traces)

    def pause(self) -> None:
        """Pause every request in place."""
        self._json("POST", "/pause_generation", {"mode": "in_place"})

    def resume(self) -> None:
        """Resume the paused requests."""
        self._json("POST", "/continue_generation", {"torch_empty_cache": False})

    def begin_update(self) -> None:
        """Open an update of the draft."""
        self._json("POST", "/begin_weight_update", {"selector": "draft"})

    def update(self, contents: Sequence[str], version: str) -> None:
        """Replace the draft's weights.

        Args:
            contents: One for each rank, which takes the whole draft and keeps its shard; from ``weights.serialize`` or
                ``weights.serialize_shared``.
            version: Version that verify steps carry from then on.
        """
        body = {
            "serialized_named_tensors": list(contents),
            "selector": "draft",
            "flush_cache": False,
            "abort_all_requests": False,
            "weight_version": version,
        }
        self._json("POST", "/update_weights_from_tensor", body)

    def set_version(self, version: str) -> None:
        """Rename the version that verify steps carry; the draft stays."""
        self._json("POST", "/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def end_update(self) -> bool:
        """Close an update; return False if none was open."""
        try:
            self._json("POST", "/end_weight_update", {})
        except CallRejectedError:
            return False
        return True

    def checksums(self) -> list[RankChecksums]:
        """Return the checksums of the draft, by rank and tensor."""
        body = {"action": "checksum", "selector": "draft", "skip_tensor_list": _SHARED}
        ranks = self._json("POST", "/weights_checker", body).get("ranks", [])
        return [RankChecksums(rank["checksums"], _read_shard(rank["parallelism_info"])) for rank in ranks]


def _read_shard(models: Sequence[Mapping[str, Any]]) -> Shard:
    """Return the place of a process among the tensor-parallel ones, which is the same for all of its models."""
    return Shard(int(models[0]["tp_rank"]), int(models[0]["tp_size"]))
