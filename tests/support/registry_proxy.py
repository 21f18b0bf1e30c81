"""A proxy that makes an MLflow server unreachable, slow, failing or stale."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import httpx

Fault = Literal["unreachable", "slow", "500", "stale"]
SLOW_S = 1.3
_ALIASES = "/api/2.0/mlflow/registered-models/get?"
_HOP_BY_HOP = {"connection", "content-length", "content-encoding", "transfer-encoding", "host", "accept-encoding"}


class RegistryProxy:
    """Forwards requests unless a ``fault`` is set; ``hits`` counts the requests that met each fault.

    ``unreachable`` closes the connection without a response. ``stale`` repeats the response kept by ``remember``.
    """

    def __init__(self, port: int, upstream: str) -> None:
        self.uri = f"http://127.0.0.1:{port}"
        self.upstream = upstream
        self.fault: Fault | None = None
        self.hits: Counter[str] = Counter()
        self.newest: httpx.Response | None = None
        self.stale: httpx.Response | None = None
        proxy = self

        class Handler(_Handler):
            registry = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="registry proxy", daemon=True)
        self._thread.start()

    def remember(self) -> None:
        """Keep the newest response about aliases as the stale one."""
        self.stale = self.newest

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """Set a fault until the block ends."""
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None

    def await_hits(self, fault: Fault, number: int) -> None:
        """Wait until ``number`` more requests have met a fault."""
        wanted, deadline = self.hits[fault] + number, time.monotonic() + 60
        while self.hits[fault] < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    registry: RegistryProxy

    def do_GET(self) -> None:
        proxy, fault = self.registry, self.registry.fault
        if fault is not None:
            proxy.hits[fault] += 1
        asks_for_aliases = self.path.startswith(_ALIASES)
        if fault == "unreachable":
            self.close_connection = True
        elif fault == "500":
            self._answer(500, b"it broke", "text/plain")
        elif fault == "stale" and asks_for_aliases and proxy.stale is not None:
            self._pass_on(proxy.stale)
        else:
            if fault == "slow":
                time.sleep(SLOW_S)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            response = httpx.get(proxy.upstream + self.path, headers=headers, timeout=30)
            if asks_for_aliases and response.status_code == 200:
                proxy.newest = response
            self._pass_on(response)

    def _pass_on(self, response: httpx.Response) -> None:
        self._answer(response.status_code, response.content, response.headers.get("content-type", "text/plain"))

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        try:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True  # the node timed out

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Requests are not logged."""
