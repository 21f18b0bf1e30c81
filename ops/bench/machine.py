"""The machine that figures were taken on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
_FLOATS = 1 << 27
"""512 MiB: several times the last cache that such a machine shares out to one core."""


def describe(threads: int) -> dict[str, Any]:
    """Processor, cores, memory, torch, threads, and how busy the machine is."""
    import psutil
    import torch
    import transformers

    return {
        "processor": _processor(),
        "flags": [flag for flag in _FLAGS if flag in _cpu_flags()],
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": threads,
        "load_average": load_average(),
    }


def load_average() -> list[float]:
    """Runnable processes over the last 1, 5 and 15 minutes."""
    return [round(load, 2) for load in os.getloadavg()]


def read_bandwidth(threads: int, repeats: int = 5) -> float:
    """Bytes a second at which so many threads read memory: the best of summing and of multiplying two halves."""
    import torch

    torch.set_num_threads(threads)
    numbers = torch.ones(_FLOATS)
    one, other = numbers.chunk(2)
    reads: tuple[Callable[[], torch.Tensor], ...] = (lambda: numbers.sum(), lambda: torch.dot(one, other))  # noqa: PLW0108 - numbers.sum has no one type
    best = 0.0
    for _ in range(repeats):
        for read in reads:
            started = time.perf_counter()
            read()
            best = max(best, numbers.nbytes / (time.perf_counter() - started))
    return best


def _processor() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return next((set(line.partition(":")[2].split()) for line in _cpuinfo() if line.startswith("flags")), set())


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
