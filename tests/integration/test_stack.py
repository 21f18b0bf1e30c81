"""Real stack: up, status, down; a killed part restarts; no process remains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from schemas.settings import Settings, load, to_environ

PARTS = ("broker", "registry", "stream", "train", "promoter", "serve")
START_S = 420


@dataclass
class Here:
    """A folder with its own stack on free ports."""

    folder: Path
    settings: Settings
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def aurora(self, *arguments: str, timeout: float = START_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "ops.cli.main", *arguments]

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, **to_environ(self.settings)}

    def processes(self) -> dict[int, psutil.Process]:
        """Return every process with this working directory, and live ones found earlier."""
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.folder) or str(self.folder) in " ".join(process.cmdline()):
                    self.seen[process.pid] = process
            except psutil.Error:
                continue
        return {pid: p for pid, p in self.seen.items() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE}

    def pid_of(self, part: str) -> int:
        for pid, process in self.processes().items():
            if process.cmdline()[-3:] == ["-m", "ops.cli.main", part]:
                return pid
        raise AssertionError(f"no process of {part}")

    def status(self) -> dict[str, object]:
        result = self.aurora("status", "--json", timeout=60)
        overview: dict[str, object] = json.loads(result.stdout)
        return overview


def eventually(what: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.3)
    return False


@pytest.fixture
def here(tmp_path: Path, smollm2: Path, free_port: Callable[[], int]) -> Iterator[Here]:
    flags: dict[str, object] = {f"{part}.port": free_port() for part in ("serve", "stream", "train", "promoter")}
    flags |= {f"stack.{name}_port": free_port() for name in ("kafka", "kafka_controller", "mlflow")}
    place = Here(
        tmp_path.resolve(), load(environ={}, flags=flags | {"target.path": str(smollm2), "train.self_generation": 0})
    )
    yield place
    left = place.processes()
    for process in left.values():
        process.kill()
    psutil.wait_procs(left.values(), timeout=10)


@pytest.mark.timeout(900)
def test_up_restarts_a_killed_stream_worker_and_down_stops_all(here: Here) -> None:
    before = here.aurora("status")
    assert before.returncode == 1
    assert "nothing runs here" in before.stderr

    up = here.aurora("up", "--detach")
    assert up.returncode == 0, up.stdout + up.stderr
    assert set(here.status()["parts"]) == set(PARTS)  # type: ignore[call-overload]

    page = f"http://127.0.0.1:{here.settings.promoter.port}/"
    assert page in up.stdout
    assert eventually(lambda: "node " in httpx.get(page).text, 30), httpx.get(page).text
    assert "no status from" not in httpx.get(page).text

    second = here.aurora("up")
    assert second.returncode == 2
    assert "already runs" in second.stderr

    worker = here.pid_of("stream")
    os.kill(worker, signal.SIGKILL)
    assert httpx.get(f"http://127.0.0.1:{here.settings.serve.port}/ready", timeout=10).status_code == 200
    stream = f"http://127.0.0.1:{here.settings.stream.port}/status"
    assert eventually(lambda: answers(stream), 120), here.aurora("status").stdout
    assert here.pid_of("stream") != worker

    assert len(here.processes()) >= len(PARTS)
    down = here.aurora("down")
    assert (down.returncode, down.stdout.strip()) == (0, "stopped")
    assert not here.processes()
    assert here.aurora("down").stdout.strip() == "nothing runs here"


@pytest.mark.timeout(900)
def test_all_parts_end_with_a_killed_up(here: Here) -> None:
    with (here.folder / "out.txt").open("w") as out:
        up = subprocess.Popen(here.command("up"), cwd=here.folder, env=here.environ, stdout=out, stderr=out)
    here.seen[up.pid] = psutil.Process(up.pid)
    ready = f"http://127.0.0.1:{here.settings.serve.port}/ready"
    assert eventually(lambda: answers(ready), START_S), (here.folder / "out.txt").read_text()
    assert len(here.processes()) > len(PARTS)

    up.kill()
    up.wait()
    assert eventually(lambda: not here.processes(), 60), [p.cmdline() for p in here.processes().values()]


def test_a_port_in_use_is_an_error_that_names_its_setting(here: Here) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", here.settings.train.port))
        taken.listen()
        up = here.aurora("up")
    assert up.returncode == 2
    assert "train.port" in up.stderr
    assert len(up.stderr.strip().splitlines()) == 1
    assert not here.processes()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=3).status_code == 200
    except httpx.HTTPError:
        return False
