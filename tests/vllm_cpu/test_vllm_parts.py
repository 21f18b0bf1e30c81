"""The parts of a draft's tensors that each rank holds, by vLLM's own layers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from vllm_node import PYTHON

ROOT = Path(__file__).resolve().parents[2]


def test_the_layers_of_each_rank_load_the_parts_that_are_compared() -> None:
    script = ROOT / "tests" / "support" / "loaded_parts.py"
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([PYTHON, script, "vllm"], env=environ, capture_output=True, text=True, check=False)
    assert done.stdout.rsplit("\n", 2)[-2:] == ["equal", ""], done.stderr[-2000:]
