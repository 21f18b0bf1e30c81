"""A proxy in front of an object store. It refuses, delays, ignores or truncates on demand."""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

Fault = Literal["store refused", "store silent", "store slow", "store cut off", "answer to a commit lost"]
DELAY_S = 1.5
_HOST = "127.0.0.1"
_REQUEST = re.compile(rb"(?:GET|HEAD|PUT|POST|DELETE) (\S+) HTTP/1\.1\r\n")
_COMMIT = re.compile(rb"PUT \S+/_delta_log/\d{20}\.json HTTP/1\.1\r\n")
_DONE = re.compile(rb"HTTP/1\.1 200 ")


class Proxy:
    """Forwards bytes unchanged, except during a fault. ``hits`` counts the requests that a fault affected.

    "answer to a commit lost" affects one commit to a table: the store makes it, and the client gets no answer.
    """

    def __init__(self, port: int, upstream: int) -> None:
        self.port = port
        self.hits: Counter[str] = Counter()
        self._upstream = upstream
        self._fault: Fault | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        """Kept here, because the event loop keeps only a weak reference to a task that waits for a stream."""
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._run(self._listen())

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[Callable[[], bool]]:
        """Inject a fault until the block ends.

        Yields a function that returns whether a request was affected. Refused connections cannot be counted here.
        """
        before = self.hits[fault]
        self._run(self._begin(fault))
        try:
            yield lambda: fault == "store refused" or self.hits[fault] > before
        finally:
            self._run(self._end())

    def close(self) -> None:
        """Stop listening, and close every connection."""
        self._run(self._refuse())
        self._run(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _begin(self, fault: Fault) -> None:
        self._fault = fault
        if fault == "store refused":
            await self._refuse()

    async def _end(self) -> None:
        self._fault = None
        if self._server is None:
            await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, _HOST, self.port)

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in self._open:
            writer.transport.abort()

    async def _finish(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        serving = asyncio.ensure_future(self._forward(reader, client))
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)

    async def _forward(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        from_store, store = await asyncio.open_connection(_HOST, self._upstream)
        self._open.add(client)
        connection = _Connection(self, client, store)
        directions = [
            asyncio.ensure_future(connection.forward_requests(reader)),
            asyncio.ensure_future(connection.forward_answers(from_store)),
        ]
        try:
            with suppress(asyncio.CancelledError):
                await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
            self._open.discard(client)
            for writer in (client, store):
                writer.transport.abort()

    def applies(self, fault: Fault) -> bool:
        """Return whether ``fault`` is active, and count the request if it is."""
        met = self._fault == fault
        self.hits[fault] += met
        if met and fault == "answer to a commit lost":
            self._fault = None
        return met


class _Connection:
    """One connection of a client, with one request after the other."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter, store: asyncio.StreamWriter) -> None:
        self._proxy, self._client, self._store = proxy, client, store
        self._commits = False

    async def forward_requests(self, reader: asyncio.StreamReader) -> None:
        """Forward requests to the store until the client closes."""
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if _REQUEST.match(data):
                    self._commits = bool(_COMMIT.match(data))
                    if self._proxy.applies("store silent"):
                        while await reader.read(1 << 16):
                            pass
                        return
                    if self._proxy.applies("store slow"):
                        await asyncio.sleep(DELAY_S)
                self._store.write(data)
                await self._store.drain()

    async def forward_answers(self, reader: asyncio.StreamReader) -> None:
        """Forward answers to the client until one side closes."""
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if self._commits and _DONE.match(data) and self._proxy.applies("answer to a commit lost"):
                    return
                if self._proxy.applies("store cut off"):
                    self._client.write(data[: len(data) // 2])
                    await self._client.drain()
                    return
                self._client.write(data)
                await self._client.drain()
