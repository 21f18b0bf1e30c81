"""The launcher with a fake of vLLM's server: start, supervision, exit codes, and the operator's endpoints."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fake_vllm import KEY
from launched import Launched, answers
from tiny_target import write_tiny_target
from vllm_stand_in import write_python

from schemas.settings import Settings, SettingsError, load
from schemas.speculator import checkpoint
from schemas.status import ServeStatus
from serving.engines.vllm.node import vllm_launch

MODULE = "serving.engines.vllm.node.vllm_launch"


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
        "serve.engine": "vllm",
        "serve.node": "node-7",
        "serve.drain_timeout": 0,
        "vllm.python": str(write_python(tmp_path / "python")),
        "vllm.draft_dir": str(tmp_path / "drafts"),
        "vllm.api_key": KEY,
    }
    return load(environ={}, flags=flags)


@pytest.fixture
def launched(
    settings: Settings, tmp_path: Path, free_port: Callable[[], int]
) -> Iterator[Callable[..., tuple[Launched, str]]]:
    """``launched(*flags)`` returns the launcher and the address of its server."""
    started: list[Launched] = []

    def start(*flags: str) -> tuple[Launched, str]:
        port = free_port()
        started.append(Launched(MODULE, settings, tmp_path / "launch.log", "--port", str(port), *flags))
        return started[-1], f"http://127.0.0.1:{port}"

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def test_the_launcher_starts_a_server_with_the_day_0_draft_and_a_signal_ends_both(
    launched: Callable[..., tuple[Launched, str]], target: Path, tmp_path: Path
) -> None:
    node, url = launched("--dtype", "float32")
    node.until(node.ready)
    command, environ = json.loads((target / "started.json").read_text())
    assert command[:4] == ["-m", "vllm.entrypoints.cli.main", "serve", str(target)]
    assert command[-2:] == ["--dtype", "float32"]
    folder = tmp_path / "drafts" / "node-7"
    assert json.loads(command[command.index("--speculative-config") + 1])["model"] == f"{folder}-loaded"
    assert (environ["VLLM_SERVER_DEV_MODE"], environ["VLLM_USE_V2_MODEL_RUNNER"]) == ("1", "0")
    assert (environ["AURORA_VLLM__API_KEY"], Path(environ["PROMETHEUS_MULTIPROC_DIR"]).is_dir()) == (KEY, True)
    status = ServeStatus.model_validate(httpx.get(f"{node.url}/status").json())
    assert (status.node, status.engine_up, status.speculator, status.line) == (
        "node-7",
        True,
        "day-0-head-0",
        checkpoint.read_manifest(folder).line,
    )
    assert (status.output_tokens, status.requests_finished, status.draft_depth) == (103, 3, 6)
    assert (status.rows_captured, status.rows_dropped, status.circuit_breaker) == (50, 7, "open")
    node.process.send_signal(signal.SIGTERM)
    assert node.ended() == 0
    assert not answers(url)


def test_the_launcher_returns_the_servers_exit_code(launched: Callable[..., tuple[Launched, str]]) -> None:
    node, _ = launched("--crash")
    assert node.ended() == 7


@pytest.mark.parametrize(
    ("version", "plugin", "message"),
    [
        ("0.31.0", "true", r"vLLM 0\.31\.0 is not supported; supported: 0\.32\.0"),
        ("0.32.0", "false", "our plugin is not"),
    ],
)
def test_a_python_without_a_supported_vllm_or_our_plugin_is_rejected(
    settings: Settings, tmp_path: Path, version: str, plugin: str, message: str
) -> None:
    python = write_python(tmp_path / "other", version, plugin)
    update = {"vllm": settings.vllm.model_copy(update={"python": str(python)})}
    with pytest.raises(SettingsError, match=rf"vllm\.python {python}: {message}"):
        vllm_launch.run(settings.model_copy(update=update), [])


def test_the_error_for_a_python_without_vllm_names_the_documentation(settings: Settings) -> None:
    update = {"vllm": settings.vllm.model_copy(update={"python": sys.executable})}
    with pytest.raises(SettingsError, match=r"vllm\.python .*docs/guides/vllm\.md"):
        vllm_launch.run(settings.model_copy(update=update), [])
