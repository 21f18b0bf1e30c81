"""What the trainer and the promoter show to the outside, and the signals that end them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set; called from the main thread."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    return stopping


class StatusServer:
    """Answers ``GET /status`` and ``GET /metrics`` from a thread of its own while the context is open."""

    def __init__(self, host: str, port: int, status: Callable[[], BaseModel], metrics: CollectorRegistry) -> None:
        """Bind the address.

        Args:
            host: Address to listen on.
            port: 0 takes a free one.
            status: Gives the current status; called from the server's threads.
            metrics: Where the process counts.
        """
        answers: dict[str, Callable[[], tuple[str, bytes]]] = {
            "/status": lambda: ("application/json", status().model_dump_json().encode()),
            "/metrics": lambda: (CONTENT_TYPE_LATEST, generate_latest(metrics)),
        }

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if (answer := answers.get(self.path)) is None:
                    self.send_error(HTTPStatus.NOT_FOUND)
                    return
                kind, body = answer()
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Polls are no news."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="status", daemon=True)

    @property
    def port(self) -> int:
        """Port that is listened on."""
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
