"""What is refused before a request is read."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http.requests import ApiError, invalid

Refuse = Callable[[ApiError], Response]
"""Counts a refused request and gives the response to it."""


class BodyLimit:
    """Lets the application have bodies up to a limit, whatever the headers say of their length."""

    def __init__(self, app: ASGIApp, *, limit: int, refuse: Refuse) -> None:
        self._app = app
        self._limit = limit
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with 413."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = None if self._told_too_large(scope) else await self._read(receive)
        if body is None:
            message = f"The body is larger than {self._limit} bytes (serve.max_body_bytes)"
            response = self._refuse(invalid(message, None, "request_too_large", status=413))
            # The rest of the body is on its way; nobody will read it.
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    def _told_too_large(self, scope: Scope) -> bool:
        told = Headers(scope=scope).get("content-length", "")
        return told.isdecimal() and int(told) > self._limit

    async def _read(self, receive: Receive) -> list[Message] | None:
        """The messages with the body; None as soon as it is too large. A client that leaves ends it early."""
        messages: list[Message] = []
        size = 0
        while not messages or messages[-1].get("more_body", False):
            messages.append(await receive())
            size += len(messages[-1].get("body", b""))
            if size > self._limit:
                return None
        return messages


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """Gives the messages that were read, then those that come."""
    left = iter(messages)

    async def replayed() -> Message:
        message = next(left, None)
        return await receive() if message is None else message

    return replayed
