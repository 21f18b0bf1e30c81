"""vLLM's server as an engine: swaps, failures, counters, and the development endpoints that only a node may call."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import KEY, FakeVllm, served
from pydantic import SecretStr
from tiny_target import write_tiny_target

from schemas.settings import Speculator
from schemas.speculator import checkpoint
from schemas.speculator.day_0_draft import create_day_0_draft
from schemas.speculator.draft_folder import write_draft_folder
from schemas.speculator.layouts import LAYERS, Verifier
from schemas.speculator.network import EagleDraft
from schemas.speculator.target_fingerprint import target_fingerprint
from serving.engines.base import SpeculationFixedError
from serving.engines.node.command_line import DraftFolder
from serving.engines.node.server_client import ServerError
from serving.engines.vllm.node.vllm_client import VllmClient
from serving.engines.vllm.node.vllm_engine import VllmEngine
from serving.engines.vllm.plugin import developer_endpoints
from serving.engines.vllm.plugin.developer_endpoints import DeveloperEndpoints

FIRST = DraftFolder(Path("/drafts/node-0"), "day-0-head-0")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def draft(target: Path) -> EagleDraft:
    return create_day_0_draft(target, Speculator(draft_vocab_size=16))


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with served(FakeVllm()) as running:
        yield running


@pytest.fixture
def engine(fake: FakeVllm, target: Path, draft: EagleDraft, tmp_path: Path) -> Iterator[VllmEngine]:
    fingerprint = target_fingerprint(target)
    line = checkpoint.line_name(fingerprint, draft.shape, draft.d2t)
    client = VllmClient(fake.url, SecretStr(KEY), 5)
    found = VllmEngine(client, fingerprint, line, FIRST, 3, tmp_path / "incoming", 5)
    found.start()
    yield found
    found.stop()
    client.close()


def test_a_version_is_written_read_and_loaded(
    fake: FakeVllm, engine: VllmEngine, draft: EagleDraft, tmp_path: Path
) -> None:
    swapped = engine.swap(draft, "4")
    assert (swapped.version, swapped.in_flight, swapped.pause_ms) == ("4", 2, 250.0)
    assert fake.calls == ["aurora_start", "aurora_read", "aurora_read", "aurora_load"]
    assert fake.loaded["4"].fc.weight.equal(draft.fc.weight.bfloat16().float())
    assert engine.health().speculator == "4"
    assert not (tmp_path / "incoming").exists()


def test_a_node_attaches_to_a_server_that_another_process_has_started(
    fake: FakeVllm, target: Path, draft: EagleDraft, tmp_path: Path
) -> None:
    fingerprint = target_fingerprint(target)
    line = checkpoint.line_name(fingerprint, draft.shape, draft.d2t)
    client = VllmClient(fake.url, SecretStr(KEY), 5)
    attached = VllmEngine(client, fingerprint, line, FIRST, 3, tmp_path / "incoming", 5, is_own=False)
    fake.faults["aurora_attach"] = "only drafts of the method eagle3 are supported"
    with pytest.raises(ServerError, match=r"eagle3 are supported; vllm\.url needs a server with our extension"):
        attached.start()
    del fake.faults["aurora_attach"]
    attached.start()
    assert (attached.health().speculator, attached.health().draft_depth) == ("attached", 5)
    attached.swap(draft, "4")
    assert attached.health().speculator == "4"
    attached.stop()
    client.close()


def test_vllm_gets_the_layers_by_its_own_numbers(target: Path, draft: EagleDraft, tmp_path: Path) -> None:
    checkpoint.write_checkpoint(draft, tmp_path / "version", target_fingerprint(target))
    folder = tmp_path / "loaded"
    write_draft_folder(draft, folder, "vllm", Verifier("target", (), 3))
    config = json.loads((folder / "config.json").read_text())
    assert config[LAYERS] == [layer + 1 for layer in draft.shape.capture_layers]
    assert config["eagle_config"][LAYERS] == list(draft.shape.capture_layers)
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "version" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["aurora_read", "aurora_load"])
def test_a_failed_swap_is_reported_and_leaves_no_files(
    fake: FakeVllm, engine: VllmEngine, draft: EagleDraft, tmp_path: Path, method: str
) -> None:
    fake.faults[method] = "it broke; version day-0-head-0 still serves"
    with pytest.raises(ServerError, match=r"version 4 is not served: it broke; version day-0-head-0 still serves"):
        engine.swap(draft, "4")
    assert (engine.health().speculator, engine.health().error) == (
        "day-0-head-0",
        "version 4 is not served: it broke; version day-0-head-0 still serves",
    )
    assert not (tmp_path / "incoming").exists()
    fake.faults.clear()
    engine.swap(draft, "4")
    assert engine.health().error is None


def test_files_that_are_never_read_end_a_swap(
    fake: FakeVllm, engine: VllmEngine, draft: EagleDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_timeout_s", 0.0)
    with pytest.raises(ServerError, match=r"vllm\.timeout"):
        engine.swap(draft, "4")


def test_an_unsupported_server_is_reported(fake: FakeVllm, engine: VllmEngine) -> None:
    fake.faults["aurora_start"] = "vLLM 9.9.9 is not supported"
    with pytest.raises(ServerError, match="9\\.9\\.9 is not supported"):
        engine.start()


def test_health_counts_what_the_server_counts(engine: VllmEngine) -> None:
    health, rows = engine.health(), engine.counts()
    assert (health.requests_running, health.requests_waiting, engine.finished) == (2, 1, 3)
    assert (health.verify_steps, health.draft_tokens, health.accepted_tokens) == (40, 120, 60)
    assert (health.output_tokens, health.draft_depth) == (103, 3)
    assert (rows.captured, rows.published, rows.pending, engine.circuit_breaker) == (50, 40, 3, "open")
    with pytest.raises(SpeculationFixedError, match="vLLM cannot stop speculation"):
        engine.speculate(on=False)


def test_a_wrong_key_names_the_setting(fake: FakeVllm) -> None:
    with pytest.raises(ServerError, match=r"vllm\.api_key"):
        VllmClient(fake.url, SecretStr("wrong"), 5).start(FIRST)


@pytest.mark.parametrize(
    ("path", "sent", "key", "status"),
    [
        ("/v1/models", "", "k", 200),
        ("/collective_rpc", "", "k", 401),
        ("/collective_rpc/", "Bearer other", "k", 401),
        ("/collective_rpc", "Bearer k", "k", 200),
        ("/collective_rpc", "Bearer ", "", 401),
    ],
)
def test_development_endpoints_require_the_key(
    monkeypatch: pytest.MonkeyPatch, path: str, sent: str, key: str, status: int
) -> None:
    monkeypatch.setenv("AURORA_VLLM__API_KEY", key)
    sent_messages: list[dict[str, Any]] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: dict[str, Any]) -> None:
        sent_messages.append(message)

    monkeypatch.setattr(developer_endpoints, "_read_paths", lambda: frozenset({"/collective_rpc"}))
    scope = {"type": "http", "path": path, "headers": [(b"authorization", sent.encode())]}
    asyncio.run(DeveloperEndpoints(app)(scope, None, send))
    assert sent_messages[0]["status"] == status
