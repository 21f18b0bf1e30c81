"""A Python executable with a fake SGLang in its environment, which starts ``fake_sglang``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# It answers the query of the launcher as SGLang's Python does, and serves as SGLang's server does.
STAND_IN = f"""#!{sys.executable}
import signal, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "support")!r}]
if sys.argv[1] == "-c":
    print("a warning first")
    print('["{{version}}", {{plugin}}]')
    sys.exit()
import json, os
from pathlib import Path
from fake_sglang import FakeSglang, served
from schemas.speculator import checkpoint
value = lambda name: sys.argv[sys.argv.index(name) + 1]
Path(value("--model-path"), "started.json").write_text(json.dumps([sys.argv, os.environ["AURORA_SERVE__NODE"]]))
if "--crash" in sys.argv:
    sys.exit(7)
if "--stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
folder = Path(value("--speculative-draft-model-path"))
fake = FakeSglang(checkpoint.read_checkpoint(folder, checkpoint.read_manifest(folder).line), value("--weight-version"))
with served(fake, int(value("--port"))):
    while True:
        time.sleep(1)
"""


def write_python(path: Path, version: str = "0.5.21", plugin: str = "true") -> Path:
    path.write_text(STAND_IN.replace("{version}", version).replace("{plugin}", plugin))
    path.chmod(0o755)
    return path
