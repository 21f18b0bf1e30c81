"""A real S3 server on loopback: SeaweedFS from a wheel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow.fs import S3FileSystem

from ops.local.process import Process

_HOST = "127.0.0.1"
_PARTS = ("master", "volume", "filer", "s3")
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
