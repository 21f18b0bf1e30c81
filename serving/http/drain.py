"""The node's end: new requests are refused, those that run are answered, then the server stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.http.body_limit import Refuse
from serving.http.requests import unavailable

_API = "/v1/"


class Drain:
    """Whether the node is about to end, and which requests still run."""

    def __init__(self) -> None:
        self.begun_at: float | None = None
        """Monotonic time at which it was told to end; None while it serves."""
        self.running = 0
        """Requests to the API that have not been answered yet."""

    @property
    def begun(self) -> bool:
        """Whether new requests are refused."""
        return self.begun_at is not None

    def begin(self) -> None:
        """Refuse what comes from here on. Called again, it changes nothing."""
        self.begun_at = time.monotonic() if self.begun_at is None else self.begun_at

    def lasted(self, seconds: float) -> bool:
        """Whether it began so long ago."""
        return self.begun_at is not None and time.monotonic() - self.begun_at >= seconds


class Draining:
    """Counts the requests that run, and refuses new ones once the drain has begun."""

    def __init__(self, app: ASGIApp, *, drain: Drain, refuse: Refuse) -> None:
        self._app = app
        self._drain = drain
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with 503."""
        if scope["type"] != "http" or not scope["path"].startswith(_API):
            await self._app(scope, receive, send)
            return
        if self._drain.begun:
            response = self._refuse(unavailable("The node is about to end; ask another one", "node_draining"))
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        self._drain.running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.running -= 1


class DrainingServer(uvicorn.Server):
    """Goes on listening after the first signal, until the requests that run have ended or ``drain_s`` is over.

    So a load balancer sees ``/ready`` turn, and a client that comes late is told why. Whatever runs after ``drain_s``
    is ended by ``give_up``, so that its client is told too. A second signal ends the server at once.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, drain_s: float, give_up: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._drain_s = drain_s
        self._give_up = give_up

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self._drain.begun:
            super().handle_exit(sig, frame)
        self._drain.begin()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; true ends the server."""
        if self._drain.begun and self._drain.running == 0:
            return True
        if self._drain.lasted(self._drain_s):
            await asyncio.to_thread(self._give_up)
            return True
        return await super().on_tick(counter)
