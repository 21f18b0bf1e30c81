"""A fake of vLLM's server in this process: its metrics, and the calls of our worker extension, with injected faults."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import MANIFEST, hash_file

KEY = "sesame"
METRICS = """\
vllm:num_requests_running{engine="0"} 2.0
vllm:num_requests_waiting{engine="0"} 1.0
vllm:request_success_total{finished_reason="stop"} 2.0
vllm:request_success_total{finished_reason="length"} 1.0
vllm:spec_decode_num_drafts_total 40.0
vllm:spec_decode_num_draft_tokens_total 120.0
vllm:spec_decode_num_accepted_tokens_total 60.0
vllm:generation_tokens_total 103.0
aurora_serve_trace_rows_captured_total 50.0
aurora_serve_trace_rows_published_total 40.0
aurora_serve_trace_rows_dropped_total{reason="too_large"} 7.0
aurora_vllm_trace_circuit_breaker_open 1.0
"""


class FakeVllm:
    """State of the server, and the calls that it received."""

    def __init__(self) -> None:
        self.version = ""
        self.loaded: dict[str, Any] = {}
        """Weights of the last version by its name."""
        self.calls: list[str] = []
        self.faults: dict[str, str] = {}
        """Reasons with which a method of the extension fails."""
        self.url = ""
        self._reads = 0
        self._read: Any = None

    def call(self, method: str, *arguments: str) -> dict[str, Any]:
        self.calls.append(method)
        if method in self.faults:
            return {"why": self.faults[method]}
        match method:
            case "aurora_start":
                self.version = self.version or arguments[1]
                return {"version": self.version}
            case "aurora_attach":
                self.version = self.version or "attached"
                return {"version": self.version, "depth": 5}
            case "aurora_read":
                folder = Path(arguments[0])
                assert hash_file(folder / MANIFEST) == arguments[1]
                self._read = checkpoint.read_checkpoint(folder, checkpoint.read_manifest(folder).line)
                self._reads += 1
                return {"is_read": self._reads > 1}
            case _:
                self.version, self.loaded[arguments[0]] = arguments[0], self._read
                return {"seconds": 0.25}


@contextmanager
def served(fake: FakeVllm, port: int = 0) -> Iterator[FakeVllm]:
    """Serve it on a port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            if self.path == "/health":
                self.reply(200, "")
            elif self.path == "/metrics":
                self.reply(200, METRICS)
            elif self.headers.get("authorization") != f"Bearer {KEY}":
                self.reply(401, json.dumps({"error": "only the node may call this endpoint"}))
            else:
                self.reply(200, json.dumps({"results": [fake.call(body["method"], *body["args"])]}))

        do_POST = do_GET

        def reply(self, status: int, content: str) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
