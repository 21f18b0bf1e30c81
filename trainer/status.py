"""What the trainer and the promoter show to the outside, and the signals that end them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from pydantic import BaseModel

from schemas.settings import SettingsError

log = structlog.get_logger()


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set; called from the main thread."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    return stopping


class Failures:
    """What does not work right now, by part of the process, and how often each part failed."""

    def __init__(self, process: str, metrics: CollectorRegistry) -> None:
        self._failed = Counter(f"aurora_{process}_failures", "Failed calls, by part.", ["part"], registry=metrics)
        self._now: dict[str, str] = {}

    @contextmanager
    def survive(self, part: str, *kinds: type[Exception]) -> Iterator[None]:
        """Go on after errors of these kinds; a part that failed is failing until it next ends without one."""
        try:
            yield
        except kinds as error:
            self._failed.labels(part).inc()
            if part not in self._now:
                log.warning("failing", part=part, error=str(error))
            self._now = {**self._now, part: str(error)}
        else:
            if part in self._now:
                log.info("recovered", part=part)
                self._now = {p: why for p, why in self._now.items() if p != part}

    @property
    def summary(self) -> str | None:
        """Why each failing part fails; None when all work."""
        return "; ".join(f"{part}: {why}" for part, why in self._now.items()) or None


class StatusServer:
    """Answers ``GET /status`` and ``GET /metrics`` from a thread of its own while the context is open."""

    def __init__(
        self, section: str, host: str, port: int, status: Callable[[], BaseModel], metrics: CollectorRegistry
    ) -> None:
        """Bind the address.

        Args:
            section: Settings that name the address, for the error.
            host: Address to listen on.
            port: 0 takes a free one.
            status: Gives the current status; called from the server's threads.
            metrics: Where the process counts.

        Raises:
            SettingsError: the address cannot be listened on.
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

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise SettingsError(f"{section}.port: cannot listen on {host}:{port}: {error.strerror}") from error
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
