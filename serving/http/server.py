"""HTTP server of a node: its address, and its drain.

During the drain new requests are rejected, running ones are answered, and then the server stops.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from schemas.settings import SettingsError
from serving.http.errors import Reject, unavailable

_API = "/v1/"


def bind(host: str, port: int) -> socket.socket:
    """Bind the address before anything is loaded; connections are accepted once the server listens.

    Raises:
        SettingsError: the address is not available.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server_socket = socket.socket(family, kind, protocol)
        server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server_socket.bind(address)
    except OSError as error:
        setting = "serve.port" if error.errno == errno.EADDRINUSE else "serve.host or serve.port"
        raise SettingsError(f"{setting}: cannot listen on {host}:{port}: {error.strerror}; set another") from error
    return server_socket


class Drain:
    """State of the drain, and the number of running requests."""

    def __init__(self) -> None:
        self.started_at: float | None = None
        """Monotonic time; None while the node serves."""
        self.running = 0
        """Requests of the API without a complete answer."""

    @property
    def is_draining(self) -> bool:
        """Whether new requests are rejected."""
        return self.started_at is not None

    def start(self) -> None:
        """Reject new requests from now on. A second call has no effect."""
        self.started_at = time.monotonic() if self.started_at is None else self.started_at

    def has_lasted(self, seconds: float) -> bool:
        """Return whether the drain started at least ``seconds`` ago."""
        return self.started_at is not None and time.monotonic() - self.started_at >= seconds


class DrainMiddleware:
    """Counts the running requests, and rejects new ones during the drain."""

    def __init__(self, app: ASGIApp, *, drain: Drain, reject: Reject) -> None:
        self._app = app
        self._drain = drain
        self._reject = reject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or reject it with 503."""
        if scope["type"] != "http" or not scope["path"].startswith(_API):
            await self._app(scope, receive, send)
            return
        if self._drain.is_draining:
            response = self._reject(unavailable("The node is shutting down; use another one", "node_draining"))
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        self._drain.running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.running -= 1


class DrainingServer(uvicorn.Server):
    """Keeps listening after the first signal, until the running requests have ended or the drain times out.

    So a load balancer sees ``/ready`` change, and a late client gets the reason. ``stop_engine`` ends the requests that
    run after ``drain_timeout``, so that their clients get an error. A second signal stops the server at once.
    """

    def __init__(
        self, config: uvicorn.Config, drain: Drain, drain_timeout: float, stop_engine: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._drain = drain
        self._drain_timeout = drain_timeout
        self._stop_engine = stop_engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the drain; on a second signal, stop."""
        if self._drain.is_draining:
            super().handle_exit(sig, frame)
        self._drain.start()

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server stops; called ten times a second."""
        if self._drain.is_draining and self._drain.running == 0:
            return True
        if self._drain.has_lasted(self._drain_timeout):
            await asyncio.to_thread(self._stop_engine)
            return True
        return await super().on_tick(counter)
