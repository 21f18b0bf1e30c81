"""A Python executable with a fake vLLM in its environment, which starts ``fake_vllm``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# It answers the query of the launcher as vLLM's Python does, and serves as vLLM's server does.
STAND_IN = """#!EXECUTABLE
import sys, time
sys.path[:0] = ["ROOT", "ROOT/tests/support"]
if sys.argv[1] == "-c":
    print("a warning first")
    print('["VERSION", PLUGIN]')
    sys.exit()
import json, os
from pathlib import Path
from fake_vllm import FakeVllm, served
value = lambda name: sys.argv[sys.argv.index(name) + 1]
names = ("VLLM_SERVER_DEV_MODE", "VLLM_USE_V2_MODEL_RUNNER", "PROMETHEUS_MULTIPROC_DIR", "AURORA_VLLM__API_KEY")
started = [sys.argv[1:], {name: os.environ.get(name) for name in names}]
Path(sys.argv[4], "started.json").write_text(json.dumps(started))
if "--crash" in sys.argv:
    sys.exit(7)
with served(FakeVllm(), int(value("--port"))):
    while True:
        time.sleep(1)
"""


def write_python(path: Path, version: str = "0.32.0+cpu", plugin: str = "true") -> Path:
    values = {"EXECUTABLE": sys.executable, "ROOT": str(ROOT), "VERSION": version, "PLUGIN": plugin}
    text = STAND_IN
    for name, value in values.items():
        text = text.replace(name, value)
    path.write_text(text)
    path.chmod(0o755)
    return path
