"""HTTP server with one fixed response, as a stand-in for a process or the registry."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from schemas.status import ServeStatus


@contextmanager
def answering(status: int, body: bytes, date: str | None = None) -> Iterator[str]:
    """Yield the address of the server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status)
            self.send_header("Date", date or self.date_time_string())
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def status_of_node(target: str, line: str) -> str:
    """Return the status of a node with the draft of day 0 as JSON."""
    numbers = dict.fromkeys((n for n, field in ServeStatus.model_fields.items() if field.annotation is int), 0)
    flags = {"engine_up": True, "draining": False, "speculating": True}
    lists: dict[str, Any] = {"expected_tokens_per_second": [], "swaps": [], "versions_rejected": []}
    names = {"node": "node-0", "target": target, "line": line, "speculator": "day-0-head-0"}
    nulls = dict.fromkeys(("pinned", "role", "registry_error", "acceptance_length"))
    return json.dumps(numbers | flags | lists | names | nulls | {"circuit_breaker": "closed"})
