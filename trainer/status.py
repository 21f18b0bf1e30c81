"""Status page, metrics and error tracking of the trainer and the promoter, and the signals that end them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

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


class StatusServer:
    """Serves ``GET /status`` and ``GET /metrics`` from its own thread while the context is open."""

    def __init__(
        self, section: str, host: str, port: int, status: Callable[[], BaseModel], metrics: CollectorRegistry
    ) -> None:
        """Bind the address.

        Args:
            section: Settings section of the address, for error messages.
            host: Address to listen on.
            port: 0 takes a free port.
            status: Returns the current status; called from the server's threads.
            metrics: Registry of the process.

        Raises:
            SettingsError: the address cannot be bound.
        """
        pages: dict[str, Callable[[], tuple[str, bytes]]] = {
            "/status": lambda: ("application/json", status().model_dump_json().encode()),
            "/metrics": lambda: (CONTENT_TYPE_LATEST, generate_latest(metrics)),
        }

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if (page := pages.get(self.path)) is None:
                    self.send_error(HTTPStatus.NOT_FOUND)
                    return
                content_type, body = page()
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Requests are not logged."""

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
