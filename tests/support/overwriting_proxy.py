"""A proxy in front of an S3 server that makes it a store without conditional writes: it confirms every PUT.

It is a process of its own: the Delta library keeps Python's lock during some requests, so a thread would not answer.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from ops.bench.object_store import ObjectStore

_HOST = "127.0.0.1"
_OF_CONNECTION = {"transfer-encoding", "connection", "content-length"}
_LISTENING = "listening"


@contextmanager
def overwriting_proxy(store: ObjectStore, port: int) -> Iterator[Callable[[], list[str]]]:
    """Forward requests to a store until the block ends.

    The signature covers the header ``If-None-Match``, so it cannot be removed. Instead the proxy confirms what the
    store refuses. Of two commits one is lost, as where the second replaces the first.

    Yields:
        A function that ends the proxy, and returns the paths of the objects that were confirmed again.
    """
    command = [sys.executable, __file__, str(port), str(store.port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == _LISTENING

    def finish() -> list[str]:
        return process.communicate()[0].splitlines()

    try:
        yield finish
    finally:
        process.kill()
        process.communicate()


class _Forwarder(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: int

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = HTTPConnection(_HOST, self.upstream, timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            status, headers, content = answer.status, answer.getheaders(), answer.read()
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        finally:
            connection.close()
        if self.command == "PUT" and status == HTTPStatus.PRECONDITION_FAILED:
            print(unquote(urlsplit(self.path).path), flush=True)
            status, headers, content, length = HTTPStatus.OK, [("ETag", '"any"')], b"", "0"
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _OF_CONNECTION:
                self.send_header(name, value)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def _serve(port: int, upstream: int) -> None:
    """Serve until the input ends."""
    _Forwarder.upstream = upstream
    server = ThreadingHTTPServer((_HOST, port), _Forwarder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(_LISTENING, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
