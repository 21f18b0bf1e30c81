"""HTTP servers of a node: addresses, API keys, and the drain.

After SIGTERM the node is not ready and still accepts requests, until load balancers have noticed; then it rejects new
requests, answers the running ones, and stops. If its engine fails, it stops at once.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
import time
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from schemas.settings import SettingsError
from serving.engines.base import EngineHealth
from serving.http.errors import Reject, invalid_request, unavailable
from serving.http.tokens import TokenFile, is_authorized

_API = "/v1/"
_CLOSE_S = 2.0


def bind(host: str, port: int, prefix: str = "serve.") -> socket.socket:
    """Bind the address before anything is loaded; connections are accepted once the server listens.

    Args:
        host: Address, from the setting ``host`` with the prefix.
        port: Port, from the setting ``port`` with the prefix.
        prefix: What precedes both names.

    Raises:
        SettingsError: the address is not available.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server_socket = socket.socket(family, kind, protocol)
        server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server_socket.bind(address)
    except OSError as error:
        setting = f"{prefix}port" if error.errno == errno.EADDRINUSE else f"{prefix}host or {prefix}port"
        raise SettingsError(f"{setting}: cannot listen on {host}:{port}: {error.strerror}; set another") from error
    return server_socket


class Drain:
    """State of the drain, and the number of running requests.

    Args:
        delay: Seconds from the start of the drain in which new requests are still accepted.
    """

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.started_at: float | None = None
        """Monotonic time; None while the node serves."""
        self.running = 0
        """Requests of the API without a complete answer."""

    @property
    def is_draining(self) -> bool:
        """Whether the drain has started: the node is not ready."""
        return self.started_at is not None

    @property
    def is_closed(self) -> bool:
        """Whether new requests are rejected."""
        return self.has_lasted(self.delay)

    def start(self) -> None:
        """Start the drain. A second call has no effect."""
        self.started_at = time.monotonic() if self.started_at is None else self.started_at

    def has_lasted(self, seconds: float) -> bool:
        """Return whether the drain started at least ``seconds`` ago."""
        return self.started_at is not None and time.monotonic() - self.started_at >= seconds


class DrainMiddleware:
    """Counts the running requests, and rejects new ones at the end of the drain's delay.

    Answers during the drain close their connection, so that clients with idle connections find another node.
    """

    def __init__(self, app: ASGIApp, *, drain: Drain, reject: Reject) -> None:
        self._app = app
        self._drain = drain
        self._reject = reject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or reject it with 503."""
        if scope["type"] != "http" or not scope["path"].startswith(_API):
            await self._app(scope, receive, send)
            return
        if self._drain.is_closed:
            response = self._reject(unavailable("The node is shutting down; use another one", "node_draining"))
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return

        async def send_closing(message: Message) -> None:
            if self._drain.is_draining and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        self._drain.running += 1
        try:
            await self._app(scope, receive, send_closing)
        finally:
            self._drain.running -= 1


class ApiKeyMiddleware:
    """Rejects requests of the API without one of the API keys, before their body is read."""

    def __init__(self, app: ASGIApp, *, keys: TokenFile, reject: Reject) -> None:
        self._app = app
        self._keys = keys
        self._reject = reject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request, or reject it with 401."""
        if scope["type"] == "http" and scope["path"].startswith(_API):
            authorization = Headers(scope=scope).get("authorization", "")
            if not is_authorized(authorization, self._keys.read()):
                message = "Send an API key of this node (serve.api_keys_file) as 'Authorization: Bearer KEY'"
                response = self._reject(invalid_request(message, None, "invalid_api_key", status=401))
                response.headers["connection"] = "close"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class ServedEngine(Protocol):
    """The engine behind a server."""

    def stop(self) -> None:
        """Stop; running requests end with an error."""

    def health(self) -> EngineHealth:
        """Return counters and state."""


class DrainingServer(uvicorn.Server):
    """Keeps listening after the first signal, until the drain's delay is over and no request runs.

    So a load balancer sees ``/ready`` change before it loses a request, and a late client gets the reason. The engine
    is stopped ``drain_timeout`` seconds after the delay, so that the clients of requests that still run get an error. A
    second signal stops the server at once. So does a failure of the engine, which has ended all requests.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, drain_timeout: float, engine: ServedEngine) -> None:
        super().__init__(config)
        self._drain = drain
        self._drain_timeout = drain_timeout
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the drain; on a second signal, stop."""
        if self._drain.is_draining:
            super().handle_exit(sig, frame)
        self._drain.start()

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server stops; called ten times a second."""
        if self._engine.health().error is not None:
            return True
        if self._drain.is_closed and self._drain.running == 0:
            return True
        if self._drain.has_lasted(self._drain.delay + self._drain_timeout):
            await asyncio.to_thread(self._engine.stop)
            return True
        return await super().on_tick(counter)


class BackgroundServer:
    """An HTTP server on a thread of its own; it handles no signals and ends with the process.

    Args:
        app: Application.
        server_socket: Bound socket; closed by the caller.
        name: Name of the thread.
    """

    def __init__(self, app: ASGIApp, server_socket: socket.socket, name: str) -> None:
        config = uvicorn.Config(
            app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        sockets = {"sockets": [server_socket]}
        self._thread = threading.Thread(target=self._server.run, kwargs=sockets, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the server; a thread that hangs ends with the process."""
        self._server.should_exit = True
        self._thread.join(_CLOSE_S)
