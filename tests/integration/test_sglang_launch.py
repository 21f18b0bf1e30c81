"""The launcher with a fake of SGLang's server: start, supervision, exit codes, and the operator's endpoints."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fake_sglang import KEY, FakeSglang, served
from launched import Launched, answers
from sglang_stand_in import write_python
from tiny_target import write_tiny_target

from schemas.settings import Settings, load
from schemas.speculator import checkpoint
from schemas.status import ServeStatus, SpeculatorStatus
from serving.engines.node.sidecar import read_target_line

TOKEN = "turnip"
MODULE = "serving.engines.sglang.node.launch"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def settings(target: Path, tmp_path: Path, free_port: Callable[[], int]) -> Settings:
    flags = {
        "target.path": str(target),
        "speculator.draft_vocab_size": 16,
        "registry.tracking_uri": "http://127.0.0.1:1",
        "registry.timeout": 1,
        "serve.port": free_port(),
        "serve.engine": "sglang",
        "serve.node": "node-7",
        "serve.drain_timeout": 0,
        "serve.admin_token": TOKEN,
        "sglang.python": str(write_python(tmp_path / "python")),
        "sglang.draft_dir": str(tmp_path / "drafts"),
        "sglang.api_key": KEY,
    }
    return load(environ={}, flags=flags)


@pytest.fixture
def launched(
    settings: Settings, tmp_path: Path, free_port: Callable[[], int]
) -> Iterator[Callable[..., tuple[Launched, str]]]:
    """``launched(*flags, **serve)`` returns the launcher and the address of its server."""
    started: list[Launched] = []

    def start(*flags: str, **serve: object) -> tuple[Launched, str]:
        port = free_port()
        changed = settings.model_copy(update={"serve": settings.serve.model_copy(update=serve)})
        started.append(Launched(MODULE, changed, tmp_path / "launch.log", "--port", str(port), *flags))
        return started[-1], f"http://127.0.0.1:{port}"

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def test_the_launcher_starts_a_server_with_the_day_0_draft_and_a_signal_ends_both(
    launched: Callable[..., tuple[Launched, str]], settings: Settings, target: Path, tmp_path: Path
) -> None:
    node, url = launched("--tp-size", "1")
    node.until(node.ready)
    arguments = (target / "started.json").read_text()
    assert '"--tp-size", "1"], "node-7"]' in arguments
    assert '"-m", "sglang.launch_server"' in arguments
    manifest = checkpoint.read_manifest(tmp_path / "drafts" / "node-7")
    status = ServeStatus.model_validate(httpx.get(f"{node.url}/status").json())
    assert (status.node, status.engine_up, status.speculator, status.line) == (
        "node-7",
        True,
        "day-0-head-0",
        manifest.line,
    )
    assert (status.output_tokens, status.requests_finished, status.draft_depth) == (103, 3, 3)
    assert (status.rows_captured, status.rows_dropped, status.circuit_breaker) == (50, 7, "open")
    headers = {"authorization": f"Bearer {TOKEN}"}
    shown = httpx.get(f"{node.url}/admin/speculator", headers=headers)
    assert SpeculatorStatus.model_validate(shown.json()).version == "day-0-head-0"
    off = httpx.post(f"{node.url}/admin/speculator/off", headers=headers)
    assert (off.status_code, off.json()["error"]["code"]) == (409, "speculation_fixed")
    assert "aurora_serve_output_tokens_total 103" in httpx.get(f"{node.url}/metrics").text
    node.process.send_signal(signal.SIGTERM)
    assert node.ended() == 0
    assert not answers(url)


def test_the_server_serves_until_the_delay_is_over_and_the_admin_api_has_its_own_port(
    launched: Callable[..., tuple[Launched, str]], free_port: Callable[[], int]
) -> None:
    admin = free_port()
    node, url = launched(drain_delay=60, admin_port=admin)
    node.until(node.ready)
    headers = {"authorization": f"Bearer {TOKEN}"}
    shown = [httpx.get(f"{own}/admin/speculator", headers=headers) for own in (node.url, f"http://127.0.0.1:{admin}")]
    assert [answer.status_code for answer in shown] == [404, 200]
    node.process.send_signal(signal.SIGTERM)
    node.until(lambda: not node.ready())
    assert answers(url)
    node.process.send_signal(signal.SIGTERM)
    assert node.ended() == 0
    assert not answers(url)


def test_the_launcher_returns_the_servers_exit_code(
    launched: Callable[..., tuple[Launched, str]],
) -> None:
    node, _ = launched("--crash")
    assert node.ended() == 7


def test_a_server_that_does_not_end_is_killed(
    launched: Callable[..., tuple[Launched, str]],
) -> None:
    node, url = launched("--stubborn")
    node.until(lambda: answers(url))
    node.process.send_signal(signal.SIGTERM)
    assert node.ended() == 128 + signal.SIGKILL
    assert not answers(url)


def test_killing_the_launcher_ends_the_server(launched: Callable[..., tuple[Launched, str]]) -> None:
    node, url = launched()
    node.until(lambda: answers(url))
    node.process.kill()
    node.ended()
    deadline = time.monotonic() + 20
    while answers(url):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_running_server_gets_a_sidecar_and_outlives_it(settings: Settings, tmp_path: Path, target: Path) -> None:
    line = read_target_line(settings)
    folder = tmp_path / "served"
    checkpoint.write_checkpoint(line.day_0_draft, folder, line.target)
    fake = FakeSglang(line.day_0_draft, "day-0-head-0")
    fake.draft, fake.paused, fake.open = str(folder), True, True
    with served(fake):
        url = settings.sglang.model_copy(update={"url": fake.url})
        node = Launched(MODULE, settings.model_copy(update={"sglang": url}), tmp_path / "log")
        node.until(node.ready)
        assert not fake.paused
        assert not fake.open
        node.process.send_signal(signal.SIGTERM)
        assert node.ended() == 0
        assert answers(fake.url)
