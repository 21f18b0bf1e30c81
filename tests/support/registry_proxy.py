"""A proxy before an MLflow server that is away, slow, at fault, or answers with what was true a while ago."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import httpx

Fault = Literal["away", "slow", "500", "old"]
SLOW_S = 1.3
_ALIASES = "/api/2.0/mlflow/registered-models/get?"
_HOP_BY_HOP = {"connection", "content-length", "content-encoding", "transfer-encoding", "host", "accept-encoding"}


class RegistryProxy:
    """Requests go through but for the ``fault`` of the moment; ``hits`` counts those that met one.

    Away, a connection is closed without an answer. Old answers are those that ``remember`` has kept.
    """

    def __init__(self, port: int, upstream: str) -> None:
        self.uri = f"http://127.0.0.1:{port}"
        self.upstream = upstream
        self.fault: Fault | None = None
        self.hits: Counter[str] = Counter()
        self.newest: httpx.Response | None = None
        self.old: httpx.Response | None = None
        proxy = self

        class Handler(_Handler):
            registry = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="registry proxy", daemon=True)
        self._thread.start()

    def remember(self) -> None:
        """Keep what was answered last about aliases: the old answer of later on."""
        self.old = self.newest

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """A registry with a fault, until the block ends."""
        self.fault = fault
        try:
            yield
        finally:
            self.fault = None

    def await_hits(self, fault: Fault, number: int) -> None:
        """Wait until so many more requests have met a fault."""
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
        if fault == "away":
            self.close_connection = True
        elif fault == "500":
            self._answer(500, b"it broke", "text/plain")
        elif fault == "old" and asks_for_aliases and proxy.old is not None:
            self._pass_on(proxy.old)
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
            self.close_connection = True  # the node has given up on a slow answer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Nothing is logged."""
