"""``aurora serve --engine vllm`` with vLLM's own server on a CPU, from an environment of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from ops.bench.serving.vllm_server import ENVIRON, ENVIRONMENT, is_answering, mode_arguments
from ops.local.process import ONE_THREAD, Process
from schemas.settings import Settings, to_environ
from schemas.status import ServeStatus

PYTHON = ENVIRONMENT / "bin" / "python"
START_S = 400
KEY = "sesame"
WHOLE = {"ignore_eos": True}
"""Option of a request whose answer has its maximum length."""


class VllmNode:
    """The launcher and its server.

    Args:
        settings: Of the node; ``vllm.api_key`` is ``KEY``.
        port: Of vLLM.
        log: For the output of both.
        arguments: Further flags of vLLM.
    """

    def __init__(self, settings: Settings, port: int, log: Path, arguments: Sequence[str] = ()) -> None:
        self.settings, self.log = settings, log
        self.url = f"http://127.0.0.1:{port}"
        flags = [*mode_arguments("float32"), "--port", str(port), *arguments]
        command = [sys.executable, "-m", "ops.cli.main", "serve", "--", *flags]
        self.process = Process("vllm", command, log, {**ENVIRON, **ONE_THREAD, **to_environ(settings)})
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def start(self) -> None:
        """Start and block until both have answered."""
        self.process.start()
        operator = f"http://127.0.0.1:{self.settings.serve.port}"
        self.process.wait_ready(
            lambda: is_answering(f"{self.url}/health") and is_answering(f"{operator}/ready"), START_S
        )

    @property
    def status(self) -> ServeStatus:
        return ServeStatus.model_validate(httpx.get(f"http://127.0.0.1:{self.settings.serve.port}/status").json())

    def complete(self, prompt: Sequence[int], tokens: int, name: str, **options: Any) -> list[int]:
        """Return the answer to a prompt; its trace has ``name`` as its label, and shares no cached prefix."""
        body = {
            "model": self.settings.target.served_model_name,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "return_token_ids": True,
            "cache_salt": name,
            "vllm_xargs": {"aurora_label": name},
        }
        answer = self.client.post("/v1/completions", json=body | options)
        answer.raise_for_status()
        found: list[int] = answer.json()["choices"][0]["token_ids"]
        return found

    def complete_all(self, prompts: Sequence[Sequence[int]], tokens: int, name: str, **options: Any) -> list[list[int]]:
        """Return the answers to all prompts, decoded concurrently."""
        with ThreadPoolExecutor() as pool:
            futures = [
                pool.submit(self.complete, prompt, tokens, f"{name}-{number}", **options)
                for number, prompt in enumerate(prompts)
            ]
            return [future.result() for future in futures]

    def close(self) -> None:
        self.client.close()
        self.process.stop()
