"""SGLang's own server over HTTP: what of its interface a node uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from schemas.errors import UserError
from serving.engines.sglang.node.checksums import Sums

_SOON_S = 5.0
"""For questions that a server answers at any time."""
_SHARED = ["embed_tokens"]
"""The target's embeddings, which a draft uses too: large, and never changed."""

_COUNTED = (
    "sglang:num_requests_total",
    "sglang:spec_verify_calls_total",
    "sglang:generation_tokens_total",
    "aurora_serve_trace_rows_captured_total",
    "aurora_serve_trace_rows_published_total",
    "aurora_serve_trace_rows_shed_total",
    "aurora_serve_trace_requests_sampled_out_total",
    "aurora_sglang_breaker_open",
)
"""Metrics, in the order of the fields of ``Counted``."""


class SglangError(UserError):
    """The server cannot be reached, or does not do what it is asked; the message says what that was."""


class RefusedByServerError(SglangError):
    """The server has answered that it will not."""


@dataclass(frozen=True, slots=True)
class About:
    """What a running server says of itself."""

    version: str
    """Of SGLang."""
    weight_version: str
    draft: str | None
    """Its ``--speculative-draft-model-path``."""
    algorithm: str | None
    ranks: int
    """Processes that the target is cut over."""
    replicas: int
    """Data parallelism."""
    depth: int
    """Tokens that are drafted one after the other."""


@dataclass(frozen=True, slots=True)
class Load:
    """What runs now."""

    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Counted:
    """Sums since the server's start."""

    requests: int
    """That have ended; so for verify steps and tokens."""
    verify_steps: int
    tokens: int
    captured: int
    """Rows of traces, by our plugin; so for what follows."""
    published: int
    shed: int
    sampled_out: int
    """Requests."""
    breaker_open: int


class SglangServer:
    """One server; safe to use from several threads.

    Every method raises ``SglangError``.

    Args:
        url: Where it listens.
        key: Its ``--admin-api-key``, or its ``--api-key``; empty where it has neither.
        timeout_s: For an update of the weights.
    """

    def __init__(self, url: str, key: SecretStr, timeout_s: float) -> None:
        self.url = url
        secret = key.get_secret_value()
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        # The server is a neighbour: a proxy of the environment is for the way out.
        self._client = httpx.Client(base_url=url, headers=headers, trust_env=False)
        self._timeout_s = timeout_s

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def healthy(self) -> bool:
        """Whether requests are answered."""
        try:
            return self._client.get("/health", timeout=_SOON_S).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def about(self) -> About:
        """Says what the server runs."""
        info = self._json("GET", "/server_info", timeout=_SOON_S)
        # What an update has changed stands here alone.
        version = str(self._json("GET", "/model_info", timeout=_SOON_S).get("weight_version"))
        return About(
            version=str(info.get("version")),
            weight_version=version,
            draft=info.get("speculative_draft_model_path"),
            algorithm=info.get("speculative_algorithm"),
            ranks=int(info.get("tp_size") or 1),
            replicas=int(info.get("dp_size") or 1),
            depth=int(info.get("speculative_num_steps") or 0),
        )

    def load(self) -> Load:
        """Says how many requests run."""
        replicas = self._json("GET", "/v1/loads", timeout=_SOON_S).get("loads", [])
        running, waiting = (
            sum(int(one[name]) for one in replicas) for name in ("num_running_reqs", "num_waiting_reqs")
        )
        return Load(running, waiting)

    def counted(self) -> Counted:
        """Says what its metrics have counted; all 0 on a server without ``--enable-metrics``."""
        text = self._answer("GET", "/metrics", timeout=_SOON_S).text
        sums = dict.fromkeys(_COUNTED, 0.0)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in sums:
                    sums[sample.name] += sample.value
        return Counted(*(int(value) for value in sums.values()))

    def pause(self) -> None:
        """Let every request stand still where it is."""
        self._json("POST", "/pause_generation", {"mode": "in_place"})

    def resume(self) -> None:
        """Let them go on."""
        self._json("POST", "/continue_generation", {"torch_empty_cache": False})

    def begin(self) -> None:
        """Open an update of the draft."""
        self._json("POST", "/begin_weight_update", {"selector": "draft"})

    def update(self, contents: Sequence[str], version: str) -> None:
        """Put a draft in place.

        Args:
            contents: For each rank, which takes the whole and keeps its part, from ``weights.packed`` or ``shared``.
            version: What the verify steps carry from then on.
        """
        body = {
            "serialized_named_tensors": list(contents),
            "selector": "draft",
            "flush_cache": False,
            "abort_all_requests": False,
            "weight_version": version,
        }
        self._json("POST", "/update_weights_from_tensor", body)

    def rename(self, version: str) -> None:
        """Let verify steps carry another version from now on, with the draft that is there."""
        self._json("POST", "/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def end(self) -> bool:
        """Close an update; false where none was open."""
        try:
            self._json("POST", "/end_weight_update", {})
        except RefusedByServerError:
            return False
        return True

    def sums(self) -> list[Sums]:
        """Says what the draft adds up to, by rank and tensor."""
        body = {"action": "checksum", "selector": "draft", "skip_tensor_list": _SHARED}
        return [rank["checksums"] for rank in self._json("POST", "/weights_checker", body).get("ranks", [])]

    def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        answer = self._answer(method, path, body, timeout)
        try:
            found = answer.json()
        except ValueError as error:
            raise SglangError(f"{self.url}{path}: the answer is no JSON: {answer.text[:200]!r}") from error
        if not isinstance(found, dict):
            raise SglangError(f"{self.url}{path}: the answer is no object: {answer.text[:200]!r}")
        return found

    def _answer(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> httpx.Response:
        try:
            answer = self._client.request(method, path, json=body, timeout=timeout or self._timeout_s)
        except httpx.HTTPError as error:
            raise SglangError(f"{self.url}{path}: {str(error) or type(error).__name__}") from error
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise SglangError(f"{self.url}{path}: the server wants another key (sglang.api_key)")
        if answer.status_code == httpx.codes.BAD_REQUEST:
            raise RefusedByServerError(f"{self.url}{path}: {_told(answer)}")
        if answer.is_error:
            raise SglangError(f"{self.url}{path}: {answer.status_code}: {_told(answer)}")
        return answer


def _told(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]
