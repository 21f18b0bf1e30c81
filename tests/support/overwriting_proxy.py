"""A proxy in front of an S3 server that makes it a store without conditional writes: it confirms every PUT."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from ops.bench.object_store import ObjectStore

_HOST = "127.0.0.1"
_OF_CONNECTION = {"transfer-encoding", "connection", "content-length"}


@contextmanager
def overwriting_proxy(store: ObjectStore, port: int) -> Iterator[list[str]]:
    """Forward requests to a store until the block ends. Yields the paths of the objects that were confirmed again.

    The signature covers the header ``If-None-Match``, so it cannot be removed. Instead the proxy confirms what the
    store refuses. Of two commits one is lost, as where the second replaces the first.
    """
    confirmed: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            connection = HTTPConnection(_HOST, store.port, timeout=30)
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
                confirmed.append(unquote(urlsplit(self.path).path))
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

    server = ThreadingHTTPServer((_HOST, port), Handler)
    thread = threading.Thread(target=server.serve_forever, name="proxy", daemon=True)
    thread.start()
    try:
        yield confirmed
    finally:
        server.shutdown()
        server.server_close()
