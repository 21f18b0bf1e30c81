"""HTTP client of a server: calls, their errors, and what every server counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from schemas.errors import UserError

QUERY_TIMEOUT_S = 5.0
"""For queries that a server answers at any time."""


class ServerError(UserError):
    """The server is unreachable, or rejects a call; the message names the call."""


class CallRejectedError(ServerError):
    """The server has rejected a call as invalid."""


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """Requests of a server now."""

    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class ServerCounters:
    """Counters since the server's start."""

    requests: int
    """Ended requests."""
    verify_steps: int
    draft_tokens: int
    accepted_tokens: int
    tokens: int
    """Output tokens."""
    captured: int
    """Trace rows of our plugin, as the next two fields."""
    published: int
    dropped: int
    unsampled: int
    """Requests."""
    circuit_breaker_open: int


class ServerClient:
    """One server; usable from several threads.

    Every method that calls the server raises ``ServerError``.

    Args:
        url: Address.
        key: Sent as ``Authorization: Bearer``; empty if the server has none.
        timeout_s: Timeout of a call that changes the server.
        key_setting: Setting that holds the key, for the error.
    """

    def __init__(self, url: str, key: SecretStr, timeout_s: float, key_setting: str) -> None:
        self.url = url
        secret = key.get_secret_value()
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        # The server is local: a proxy of the environment is for outbound connections.
        self._client = httpx.Client(base_url=url, headers=headers, trust_env=False)
        self._timeout_s, self._key_setting = timeout_s, key_setting

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def is_healthy(self) -> bool:
        """Return whether the server answers requests."""
        try:
            return self._client.get("/health", timeout=QUERY_TIMEOUT_S).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def read_metrics(self, names: Sequence[str]) -> list[int]:
        """Return the sum of each metric over its labels; 0 for one that the server does not export."""
        sums = dict.fromkeys(names, 0.0)
        for family in text_string_to_metric_families(self._call("GET", "/metrics", timeout=QUERY_TIMEOUT_S).text):
            for sample in family.samples:
                if sample.name in sums:
                    sums[sample.name] += sample.value
        return [int(value) for value in sums.values()]

    def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        response = self._call(method, path, body, timeout)
        try:
            found = response.json()
        except ValueError as error:
            raise ServerError(f"{self.url}{path}: the response is no JSON: {response.text[:200]!r}") from error
        if not isinstance(found, dict):
            raise ServerError(f"{self.url}{path}: the response is no object: {response.text[:200]!r}")
        return found

    def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None
    ) -> httpx.Response:
        try:
            response = self._client.request(method, path, json=body, timeout=timeout or self._timeout_s)
        except httpx.HTTPError as error:
            raise ServerError(f"{self.url}{path}: {str(error) or type(error).__name__}") from error
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise ServerError(f"{self.url}{path}: the server requires another key ({self._key_setting})")
        if response.status_code == httpx.codes.BAD_REQUEST:
            raise CallRejectedError(f"{self.url}{path}: {_message(response)}")
        if response.is_error:
            raise ServerError(f"{self.url}{path}: {response.status_code}: {_message(response)}")
        return response


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:300]
