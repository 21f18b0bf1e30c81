"""Child process: its group ends with it, errors name its log, and it ends with its parent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from processes import gone

from ops.local.process import Process, StartError

TREE = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); {}"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + TREE


def eventually(what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not what():
        time.sleep(0.02)
    return what()


def tree_of(process: Process) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    assert eventually(lambda: bool(parent.children()))
    return [parent, *parent.children(recursive=True)]


def python(code: str, log: Path, **changes: int) -> Process:
    return Process("child", [sys.executable, "-c", code], log, **changes)


@pytest.mark.parametrize("code", [TREE, DEAF])
def test_children_end_with_the_process_even_if_sigterm_is_ignored(code: str, tmp_path: Path) -> None:
    process = python(code.format("time.sleep(99)"), tmp_path / "log")
    process.start()
    tree = tree_of(process)
    process.stop(grace_s=0.5)
    assert eventually(lambda: gone(tree))
    assert not process.alive


def test_output_is_appended_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "child.log"
    for _ in range(2):
        process = python("import sys; print('out'); print('err', file=sys.stderr)", log)
        process.start()
        assert eventually(lambda p=process: not p.alive)  # type: ignore[misc]
    assert sorted(log.read_text().split()) == ["err", "err", "out", "out"]


def test_an_early_exit_is_an_error_that_names_the_log(tmp_path: Path) -> None:
    process = python("raise SystemExit(3)", tmp_path / "child.log")
    process.start()
    with pytest.raises(StartError, match=r"child ended with code 3 while starting; read .*child\.log"):
        process.wait_ready(lambda: False, 20)


def test_a_readiness_timeout_is_an_error_that_names_the_log(tmp_path: Path) -> None:
    process = python("import time; time.sleep(99)", tmp_path / "child.log")
    process.start()
    with pytest.raises(StartError, match="not ready after 0 s"):
        process.wait_ready(lambda: False, 0.2)
    process.stop()


def test_a_process_runs_with_one_thread_and_its_nice_value(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = python("import os; print(os.environ['OMP_NUM_THREADS'], os.nice(0))", log, nice=7)
    process.start()
    assert eventually(lambda: not process.alive)
    most = 19
    assert log.read_text().split() == ["1", str(min(os.nice(0) + 7, most))]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal on a parent's death is Linux's")
def test_a_process_ends_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from ops.local.process import Process; "
        "p = Process('child', [sys.executable, '-c', 'import time; time.sleep(99)'], Path(sys.argv[1])); "
        "p.start(); print(p.pid, flush=True); time.sleep(99)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert eventually(lambda: gone([child]))


def test_children_end_when_the_process_exits(tmp_path: Path) -> None:
    process = python(TREE.format("time.sleep(0.5)"), tmp_path / "log")
    process.start()
    tree = tree_of(process)
    assert eventually(lambda: not process.alive)
    assert eventually(lambda: gone(tree))


def test_an_ended_process_gets_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id may belong to another program."""
    process = python("", tmp_path / "log")
    process.start()
    assert eventually(lambda: not process.alive)
    monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("signalled"))
    process.stop()
    assert process.exit_code == 0


def test_stop_before_the_start_does_nothing(tmp_path: Path) -> None:
    python("", tmp_path / "log").stop()
