"""The launcher of another project's server, in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx

from schemas.settings import Settings, to_environ

ROOT = Path(__file__).resolve().parents[2]
RUN = "import sys; from schemas.settings import load; from {module} import run; sys.exit(run(load(), sys.argv[1:]))"


class Launched:
    """The launcher in ``module``, with flags of its server."""

    def __init__(self, module: str, settings: Settings, log: Path, *flags: str) -> None:
        self.log = log
        self.url = f"http://127.0.0.1:{settings.serve.port}"
        environ = {**os.environ, **to_environ(settings), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with log.open("wb") as output:
            command = [sys.executable, "-c", RUN.format(module=module), *flags]
            self.process = subprocess.Popen(command, env=environ, stdout=output, stderr=output, cwd=log.parent)

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not holds():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def ready(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/ready").status_code == 200
        return False

    def ended(self) -> int:
        return self.process.wait(60)


def answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health").status_code == 200
    return False
