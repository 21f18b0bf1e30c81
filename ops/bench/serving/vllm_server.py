"""vLLM's own server, unmodified, on this machine's processors, from the environment that ``make vllm-peer`` builds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from ops.local.process import Process

ENVIRONMENT = Path(__file__).resolve().parents[3] / ".venv-vllm"
MODEL = "target"
"""Name under which vLLM serves the target."""

_START_S = 900
"""Without ``--enforce-eager`` it compiles for minutes."""
ENVIRON = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def mode_arguments(dtype: str, *, compiled: bool = False) -> list[str]:
    """Return the arguments for one way to run vLLM.

    Args:
        dtype: Of weights and activations.
        compiled: Whether it compiles the model, for minutes at the first start.
    """
    return ["--dtype", dtype, *([] if compiled else ["--enforce-eager"])]


def draft_arguments(draft: Path, tokens: int) -> list[str]:
    """Return the arguments for drafting ``tokens`` in a row with a folder from ``write_draft_folder``."""
    return [
        "--speculative-config",
        json.dumps({"method": "eagle3", "model": str(draft), "num_speculative_tokens": tokens}),
    ]


def find_version() -> str | None:
    """Return the version of vLLM in the environment; None without one."""
    if not (ENVIRONMENT / "stamp").exists():
        return None
    folders = sorted(ENVIRONMENT.glob("lib/python3*/site-packages/vllm-*.dist-info"))
    return folders[0].name.removeprefix("vllm-").removesuffix(".dist-info") if folders else None


def is_answering(url: str) -> bool:
    """Return whether a server answers with 200."""
    with suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5).status_code == httpx.codes.OK
    return False


class VllmServer:
    """``vllm serve`` with one target, on a port of loopback."""

    def __init__(self, target: Path, port: int, log: Path, arguments: Sequence[str], threads: int = 1) -> None:
        """Name the server; nothing is started yet.

        Args:
            target: The model, in Hugging Face format.
            port: Free on loopback.
            log: For its output.
            arguments: Further arguments of ``vllm serve``, for example from ``mode_arguments``.
            threads: OpenMP threads, which are bound to no core: other programs may use any.
        """
        self.url = f"http://127.0.0.1:{port}"
        where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL]
        command = [str(ENVIRONMENT / "bin" / "vllm"), "serve", str(target), *where, *arguments]
        self._process = Process("vllm", command, log, {**ENVIRON, "OMP_NUM_THREADS": str(threads)})

    def start(self) -> None:
        """Start, without waiting."""
        self._process.start()

    def wait_ready(self) -> None:
        """Block until requests are answered.

        Raises:
            StartError: it ended or was not ready in time.
        """
        self._process.wait_ready(lambda: is_answering(f"{self.url}/health"), _START_S)

    def stop(self) -> None:
        """Stop; do nothing before the start."""
        self._process.stop()

    def processor_s(self) -> float:
        """Return the processor seconds so far of all its processes."""
        import psutil

        if self._process.pid is None or not self._process.alive:
            return 0.0
        parent = psutil.Process(self._process.pid)
        times = [process.cpu_times() for process in (parent, *parent.children(recursive=True))]
        return sum(time.user + time.system for time in times)
