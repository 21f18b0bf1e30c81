"""SGLang's own server on a CPU: unmodified, from an environment of its own, on stand-ins for its compiled operators.

It shows the control path: scheduling, drafting, verifying, weight updates, plugins. It says nothing about kernels or
speed, and the verifier takes the likeliest token whatever the temperature.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from ops.local.process import Process
from schemas.settings import Settings, to_environ

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VERSION = os.environ.get("SGLANG_UNDER_TEST", "0.5.23")
ENVIRONMENT = ROOT / f".venv-sglang-{VERSION}"
PYTHON = ENVIRONMENT / "bin" / "python"
START_S = 240

_ENVIRON = {
    "HF_HUB_OFFLINE": "1",
    "SGLANG_USE_CPU_ENGINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # the compiler would need minutes, and gain nothing here
}
# Named apart, the backend stays what it is: a single --attention-backend is changed where the processor has no AMX.
_ARGUMENTS = (
    "--device", "cpu", "--dtype", "float32",
    "--prefill-attention-backend", "intel_amx", "--decode-attention-backend", "intel_amx",
    "--max-total-tokens", "20000", "--max-running-requests", "8", "--context-length", "2048",
    "--chunked-prefill-size", "1024", "--cuda-graph-backend-decode", "disabled",
)  # fmt: skip


def eagle(draft: Path, *, steps: int = 3, width: int = 1, nodes: int | None = None) -> list[str]:
    """Flags for speculation: ``steps`` tokens one after the other, the ``width`` likeliest at each.

    Args:
        draft: Folder of a speculator version.
        steps: Depth of what is drafted.
        width: 1 drafts chains; more drafts trees.
        nodes: Tokens that are verified in a verify step, the root among them; a whole chain by default.
    """
    return [
        "--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(draft),
        "--speculative-num-steps", str(steps), "--speculative-eagle-topk", str(width),
        "--speculative-num-draft-tokens", str(nodes or steps + 1),
    ]  # fmt: skip


class Server:
    """``python -m sglang.launch_server`` with one model, on a port of loopback."""

    def __init__(
        self,
        model: Path,
        port: int,
        log: Path,
        arguments: Sequence[str] = (),
        *,
        settings: Settings | None = None,
        path: Sequence[Path] = (),
        launched: bool = False,
    ) -> None:
        """Name the server; nothing is started yet.

        Args:
            model: The target, in Hugging Face format.
            port: Free on loopback.
            log: For its output.
            arguments: Further flags of SGLang.
            settings: Those of our plugin, which is loaded only where they are given.
            path: Further folders that its Python imports from.
            launched: It is started by ``aurora serve`` with ``settings``, which name the target.
        """
        self.url = f"http://127.0.0.1:{port}"
        where = ["--host", "127.0.0.1", "--port", str(port), "--model-path", str(model)]
        start = ["-m", "sglang.launch_server"]
        if launched:
            start, path = ["-m", "ops.cli.main", "serve", "--"], [ROOT, *path]
        command = [sys.executable if launched else str(PYTHON), *start, *where, *_ARGUMENTS, *arguments]
        imported = ":".join(map(str, (*path, HERE / "standins")))
        plugin = to_environ(settings) if settings else {"SGLANG_PLUGINS": "none"}
        variables = {**_ENVIRON, "PYTHONPATH": imported, **plugin}
        self.process = Process("sglang", command, log, variables)
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def start(self) -> Server:
        """Start and block until requests are answered."""
        self.process.start()
        try:
            self.process.wait_ready(self.ready, START_S)
        except BaseException:
            self.close()
            raise
        return self

    def ready(self) -> bool:
        """True when the server has answered a request of its own, which it sends itself first of all."""
        with suppress(httpx.HTTPError):
            return self.client.get("/health").status_code == 200
        return False

    def generate(self, prompt: Sequence[int], tokens: int, **options: Any) -> dict[str, Any]:
        """SGLang's answer to one prompt: ``output_ids`` and ``meta_info``.

        Args:
            prompt: Token ids.
            tokens: Longest answer.
            options: Further fields of the request; ``sampling`` adds to its sampling parameters.
        """
        sampling = {"temperature": 0, "max_new_tokens": tokens, **options.pop("sampling", {})}
        answer = self.client.post("/generate", json={"input_ids": list(prompt), "sampling_params": sampling, **options})
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """Any other call."""
        return self.client.post(path, json=dict(body))

    def metric(self, name: str) -> float:
        """Return the sum over all processes and labels."""
        text = self.client.get("/metrics").text
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))

    def close(self) -> None:
        """End it with everything that it started."""
        self.client.close()
        self.process.stop()
