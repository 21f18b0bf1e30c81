"""Status page, metrics and error tracking of the trainer and the promoter, and the signals that end them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import urlsplit

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from pydantic import BaseModel

from schemas.settings import SettingsError
from schemas.telemetry.metrics import counter_by

log = structlog.get_logger()


def stop_on_signals() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set; call it from the main thread."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    return stopping


class ErrorTracker:
    """Current errors by part of the process, and a counter of errors by part.

    Args:
        process: Its name in the metric.
        parts: All parts of the process.
        metrics: Takes the counter.
    """

    def __init__(self, process: str, parts: Sequence[str], metrics: CollectorRegistry) -> None:
        self._parts = parts
        self._errors = counter_by(f"aurora_{process}_errors", "Failed calls, by part.", "part", parts, metrics)
        self._current: dict[str, str] = {}
        ready = Gauge(f"aurora_{process}_ready", "1 while the last call of every part succeeded.", registry=metrics)
        ready.set_function(lambda: not self._current)

    @contextmanager
    def catch(self, part: str, *kinds: type[Exception]) -> Iterator[None]:
        """Suppress and count errors of these kinds; the part counts as failing until it next ends without one.

        Raises:
            ValueError: ``part`` is none of the process.
        """
        if part not in self._parts:
            raise ValueError(f"{part}: no part among {', '.join(self._parts)}")
        try:
            yield
        except kinds as error:
            self._errors.labels(part).inc()
            if part not in self._current:
                log.warning("part_failed", part=part, error=str(error))
            self._current = {**self._current, part: str(error)}
        else:
            if part in self._current:
                log.info("part_recovered", part=part)
                self._current = {p: why for p, why in self._current.items() if p != part}

    @property
    def summary(self) -> str | None:
        """The current error of each failing part; None if all work."""
        return "; ".join(f"{part}: {why}" for part, why in self._current.items()) or None


MAX_FORM_BYTES = 16 << 10
"""Maximum size of a form that a page accepts."""
_REQUEST_TIMEOUT_S = 10.0
"""How long a client may take to send a request."""


@dataclass(frozen=True, slots=True)
class PageAnswer:
    """Answer to a request for a page."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/html; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


class Pages(Protocol):
    """Pages beside ``/status`` and ``/metrics``; called from the server's threads."""

    def get(self, path: str, query: str) -> PageAnswer | None:
        """Return a page; None if there is none at the path."""

    def post(self, path: str, headers: Message[str, str], form: bytes) -> PageAnswer | None:
        """Accept a form of ``application/x-www-form-urlencoded``; None if none is accepted at the path."""


class _Handler(BaseHTTPRequestHandler):
    """Answers requests with routes of the process and with further pages."""

    timeout = _REQUEST_TIMEOUT_S
    routes: Mapping[str, Callable[[], PageAnswer]]
    further: Pages | None

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if route := self.routes.get(url.path):
            self._answer(route())
        else:
            self._answer(self.further.get(url.path, url.query) if self.further else None)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/x-www-form-urlencoded":
            self.send_error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        elif not length.isdecimal():
            self.send_error(HTTPStatus.LENGTH_REQUIRED)
        elif int(length) > MAX_FORM_BYTES:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            form, path = self.rfile.read(int(length)), urlsplit(self.path).path
            self._answer(self.further.post(path, self.headers, form) if self.further else None)

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""

    def _answer(self, answer: PageAnswer | None) -> None:
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)


class StatusServer:
    """Serves ``GET /status``, ``GET /metrics`` and pages from its own thread while the context is open."""

    def __init__(
        self,
        section: str,
        host: str,
        port: int,
        status: Callable[[], BaseModel],
        metrics: CollectorRegistry,
        pages: Pages | None = None,
    ) -> None:
        """Bind the address.

        Args:
            section: Settings section of the address, for error messages.
            host: Address to listen on.
            port: 0 takes a free port.
            status: Returns the current status; called from the server's threads.
            metrics: Registry of the process.
            pages: Further pages, if any.

        Raises:
            SettingsError: the address cannot be bound.
        """
        own: dict[str, Callable[[], PageAnswer]] = {
            "/status": lambda: PageAnswer(HTTPStatus.OK, status().model_dump_json().encode(), "application/json"),
            "/metrics": lambda: PageAnswer(HTTPStatus.OK, generate_latest(metrics), CONTENT_TYPE_LATEST),
        }

        class Handler(_Handler):
            routes, further = own, pages

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise SettingsError(f"{section}.port: cannot listen on {host}:{port}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="status", daemon=True)

    @property
    def port(self) -> int:
        """Port that the server listens on."""
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
