"""Embedded registry: an MLflow server on loopback with SQLite and served artifacts.

``python -m ops.local.mlflow_server FOLDER PORT`` runs it until SIGTERM. This wrapper process exists because MLflow
starts a second process and leaves it behind when the first one is terminated.
"""

from __future__ import annotations

import signal
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

from ops.local.process import Process, StartError

HOST = "127.0.0.1"
_ENVIRON = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves a dozen processes
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class RegistryServer:
    """MLflow server with its data in ``folder``."""

    def __init__(self, folder: Path, port: int, log: Path | None = None) -> None:
        self.folder = folder.absolute()
        self.port = port
        log = log or self.folder / "registry.log"
        command = [sys.executable, "-m", "ops.local.mlflow_server", str(self.folder), str(port)]
        self.process = Process("registry", command, log, _ENVIRON, nice=10)

    @property
    def uri(self) -> str:
        """Address for MLflow clients."""
        return f"http://{HOST}:{self.port}"

    def start(self, timeout_s: float = 180) -> None:
        """Start and block until the server answers (13-23 s on two busy cores).

        Raises:
            StartError: it ended or was not ready in time; the message names the log.
        """
        self.process.start()
        try:
            self.process.wait_ready(self.ready, timeout_s)
        except StartError:
            self.stop()
            raise

    def ready(self) -> bool:
        """Return whether the server answers."""
        with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:  # noqa: S310
            return bool(answer.status == 200)
        return False

    def stop(self) -> None:
        """Stop the server; its data stays."""
        self.process.stop()


def server_command(folder: Path, port: int) -> list[str]:
    """Return the MLflow command for a server on SQLite with served artifacts."""
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", HOST, "--port", str(port), "--workers", "1"),
        *("--uvicorn-opts", "--log-level warning"),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
        *("--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")),
    ]


def main(folder: Path, port: int) -> int:
    """Run the server until SIGTERM, SIGINT or its own end; return its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Process("mlflow", server_command(folder, port), Path("/dev/stderr"), _ENVIRON)
    wanted = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    server.start()
    while server.alive:
        if signal.sigwait(wanted) != signal.SIGCHLD:
            server.stop(grace_s=5)
            return 0
    return server.exit_code or 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
