"""A serving node in its own process, for tests that need all of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai

from schemas.settings import Settings, to_environ
from schemas.status import ServeStatus

MODEL = "smollm2-135m-instruct"
_COMMAND = "from schemas.settings import load; from serving.node import run; run(load())"


class Node:
    """``aurora serve`` in its own process."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.log = folder / "serve.log"
        self.url = f"http://127.0.0.1:{settings.serve.port}"
        environ = {**to_environ(settings), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND], env=_without_settings() | environ, stderr=log, stdout=log
            )
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with suppress(httpx.HTTPError):
                return httpx.get(f"{self.url}/ready").status_code == 200
            return False

        eventually(ready, 120)

    def ask(self, content: str, **options: Any) -> Any:
        messages: Any = [{"role": "user", "content": content}]
        options = {"temperature": 0, "max_tokens": 24} | options
        return self.client.chat.completions.create(model=MODEL, messages=messages, **options)

    def status(self) -> ServeStatus:
        return ServeStatus.model_validate(httpx.get(f"{self.url}/status").json())

    def close(self) -> None:
        """Kill the process if it still runs."""
        self.client.close()
        self.process.kill()
        self.process.wait()

    def end(self) -> dict[str, Any]:
        """Send SIGTERM; return the node's last log entry about its traces."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0, self.log.read_text()
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        closed: dict[str, Any] = next(line for line in lines if line["event"] == "traces_closed")
        return closed


def _without_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("AURORA_")}


def eventually(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
