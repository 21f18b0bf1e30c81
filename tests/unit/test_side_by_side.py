"""Whoever waits for computations side by side may end in any way: they end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ops.side_by_side import side_by_side

_WAITER = """
import sys
sys.path.insert(0, {tests!r})
from test_side_by_side import sleep_long
from ops.side_by_side import side_by_side
if __name__ == "__main__":
    list(side_by_side(sleep_long, [{folder!r}] * 3, 2))
"""


def squared(number: int) -> int:
    return number**2


def fail(number: int) -> int:
    raise ValueError(f"{number} is odd")


def sleep_long(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


@pytest.fixture
def waiter(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for two of three jobs that run; its folder has a file with the id of each."""
    script, jobs = tmp_path / "waiter.py", tmp_path / "jobs"
    jobs.mkdir()
    script.write_text(_WAITER.format(tests=str(Path(__file__).parent), folder=str(jobs)))
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, str(script)], env=environ, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: len(list(jobs.iterdir())) == 2)
        yield process
        process.kill()


def test_every_job_comes_with_its_result() -> None:
    assert dict(side_by_side(squared, [1, 2, 3], 2)) == {1: 1, 2: 4, 3: 9}


def test_what_a_job_raises_is_raised_here() -> None:
    with pytest.raises(ValueError, match="3 is odd"):
        list(side_by_side(fail, [3], 2))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_jobs_end_with_the_process_that_waits_for_them(
    how: signal.Signals, waiter: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    ids = [int(file.name) for file in (tmp_path / "jobs").iterdir()]
    waiter.send_signal(how)
    assert waiter.wait(20) != 0
    wait_until(lambda: not any(map(is_alive, ids)))
    assert len(list((tmp_path / "jobs").iterdir())) == 2, "the third was never begun"


def is_alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(reached: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < until, "not reached"
        time.sleep(0.05)
