"""Parallel computations end with the process that waits for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import gone
from serving_node import eventually

from ops.replay.process_pool import run_in_processes

_WAITER = """
import os, sys, time
from pathlib import Path
from ops.replay.process_pool import run_in_processes

def sleep_long(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)

if __name__ == "__main__":
    list(run_in_processes(sleep_long, [sys.argv[1]] * 3, 2))
"""


def squared(number: int) -> int:
    return number**2


def fail(number: int) -> int:
    raise ValueError(f"{number} is odd")


@pytest.fixture
def waiter(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for two running jobs of three; its folder has a file named by the id of each."""
    script, jobs = tmp_path / "waiter.py", tmp_path / "jobs"
    jobs.mkdir()
    script.write_text(_WAITER)
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen([sys.executable, str(script), str(jobs)], env=environ, stderr=subprocess.DEVNULL) as process:
        eventually(lambda: len(list(jobs.iterdir())) == 2)
        yield process
        process.kill()


def test_every_job_is_returned_with_its_result() -> None:
    assert dict(run_in_processes(squared, [1, 2, 3], 2)) == {1: 1, 2: 4, 3: 9}


def test_an_exception_of_a_job_is_raised_in_the_caller() -> None:
    with pytest.raises(ValueError, match="3 is odd"):
        list(run_in_processes(fail, [3], 2))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_jobs_end_with_the_process_that_waits_for_them(
    how: signal.Signals, waiter: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    running = [psutil.Process(int(file.name)) for file in (tmp_path / "jobs").iterdir()]
    waiter.send_signal(how)
    assert waiter.wait(20) != 0
    eventually(lambda: gone(running))
    assert len(list((tmp_path / "jobs").iterdir())) == 2, "the third job never started"
