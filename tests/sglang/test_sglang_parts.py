"""The parts of a draft's tensors that each rank holds, by SGLang's own layers."""

from __future__ import annotations

import os
import subprocess

from sglang_server import HERE, PYTHON, ROOT


def test_the_layers_of_each_rank_load_the_parts_that_are_compared() -> None:
    script = ROOT / "tests" / "support" / "loaded_parts.py"
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{HERE / 'standins'}", "SGLANG_USE_CPU_ENGINE": "1"}
    done = subprocess.run([PYTHON, script, "sglang"], env=environ, capture_output=True, text=True, check=False)
    assert done.stdout.rsplit("\n", 2)[-2:] == ["equal", ""], done.stderr[-2000:]
