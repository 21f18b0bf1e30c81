"""HTTP client of SGLang's own server: the part of its interface that a node uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from schemas.errors import UserError
from serving.engines.sglang.node.weights import Checksums

_QUERY_TIMEOUT_S = 5.0
"""For queries that a server answers at any time."""
_SHARED = ["embed_tokens"]
"""The target's embeddings, which a draft uses too: large, and never changed."""

_COUNTERS = (
    "sglang:num_requests_total",
    "sglang:spec_verify_calls_total",
    "sglang:generation_tokens_total",
    "aurora_serve_trace_rows_captured_total",
    "aurora_serve_trace_rows_published_total",
    "aurora_serve_trace_rows_dropped_total",
    "aurora_serve_trace_requests_unsampled_total",
    "aurora_sglang_trace_circuit_breaker_open",
)
"""Metrics, in the order of the fields of ``ServerCounters``."""


class SglangError(UserError):
    """The server is unreachable, or rejects a call; the message names the call."""


class CallRejectedError(SglangError):
    """The server has rejected a call as invalid."""


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


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """Requests of a server now."""

    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class ServerCounters:
    """Counters since the server's start."""

    requests: int
    """Ended requests; verify steps and tokens are theirs."""
    verify_steps: int
    tokens: int
    captured: int
    """Trace rows of our plugin, as the next two fields."""
    published: int
    dropped: int
    unsampled: int
    """Requests."""
    circuit_breaker_open: int


class SglangServer:
    """One server; usable from several threads.

    Every method raises ``SglangError``.

    Args:
        url: Address.
        key: Its ``--admin-api-key``, or its ``--api-key``; empty if it has neither.
        timeout_s: Timeout of a weight update.
    """

    def __init__(self, url: str, key: SecretStr, timeout_s: float) -> None:
        self.url = url
        secret = key.get_secret_value()
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        # The server is local: a proxy of the environment is for outbound connections.
        self._client = httpx.Client(base_url=url, headers=headers, trust_env=False)
        self._timeout_s = timeout_s

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def is_healthy(self) -> bool:
        """Return whether the server answers requests."""
        try:
            return self._client.get("/health", timeout=_QUERY_TIMEOUT_S).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def info(self) -> ServerInfo:
        """Return the server's configuration."""
        info = self._json("GET", "/server_info", timeout=_QUERY_TIMEOUT_S)
        # Only this endpoint shows the version after an update.
        version = str(self._json("GET", "/model_info", timeout=_QUERY_TIMEOUT_S).get("weight_version"))
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
        replicas = self._json("GET", "/v1/loads", timeout=_QUERY_TIMEOUT_S).get("loads", [])
        running, waiting = (
            sum(int(one[name]) for one in replicas) for name in ("num_running_reqs", "num_waiting_reqs")
        )
        return ServerLoad(running, waiting)

    def counters(self) -> ServerCounters:
        """Return the counters of the server's metrics; all 0 on a server without ``--enable-metrics``."""
        text = self._call("GET", "/metrics", timeout=_QUERY_TIMEOUT_S).text
        sums = dict.fromkeys(_COUNTERS, 0.0)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in sums:
                    sums[sample.name] += sample.value
        return ServerCounters(*(int(value) for value in sums.values()))

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

    def checksums(self) -> list[Checksums]:
        """Return the checksums of the draft, by rank and tensor."""
        body = {"action": "checksum", "selector": "draft", "skip_tensor_list": _SHARED}
        return [rank["checksums"] for rank in self._json("POST", "/weights_checker", body).get("ranks", [])]

    def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        response = self._call(method, path, body, timeout)
        try:
            found = response.json()
        except ValueError as error:
            raise SglangError(f"{self.url}{path}: the response is no JSON: {response.text[:200]!r}") from error
        if not isinstance(found, dict):
            raise SglangError(f"{self.url}{path}: the response is no object: {response.text[:200]!r}")
        return found

    def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> httpx.Response:
        try:
            response = self._client.request(method, path, json=body, timeout=timeout or self._timeout_s)
        except httpx.HTTPError as error:
            raise SglangError(f"{self.url}{path}: {str(error) or type(error).__name__}") from error
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise SglangError(f"{self.url}{path}: the server requires another key (sglang.api_key)")
        if response.status_code == httpx.codes.BAD_REQUEST:
            raise CallRejectedError(f"{self.url}{path}: {_message(response)}")
        if response.is_error:
            raise SglangError(f"{self.url}{path}: {response.status_code}: {_message(response)}")
        return response


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:300]
