"""A swap into SGLang's server is complete or rolled back; a failure is reported, and the server continues to serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_sglang import KEY, FakeSglang, served
from pydantic import SecretStr
from version_registry import DRAFTS, LINE, TARGET, FakeRegistry

from schemas.settings import Settings
from schemas.speculator.checkpoint import CheckpointError, write_checkpoint
from schemas.speculator.network import EagleDraft, random_draft
from serving.engines.base import SpeculationFixedError
from serving.engines.node.server_client import ServerError
from serving.engines.sglang.node import remote_engine, weights
from serving.engines.sglang.node.client import SglangServer
from serving.engines.sglang.node.remote_engine import RemoteEngine, ServedDraft
from serving.versions.poller import VersionPoller

UPDATE = ["/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"]
REJECTED = (400, {"success": False, "message": "not now"})
BROKEN = (500, {"message": "it broke"})


@pytest.fixture
def fake() -> Iterator[FakeSglang]:
    with served(FakeSglang(DRAFTS["1"], "1")) as running:
        yield running


def server_of(fake: FakeSglang, key: str = KEY) -> SglangServer:
    return SglangServer(fake.url, SecretStr(key), timeout_s=5)


def engine_of(
    fake: FakeSglang, served: EagleDraft | None = DRAFTS["1"], *, shares_memory: bool = False
) -> RemoteEngine:
    began = ServedDraft("1", served) if served else None
    engine = RemoteEngine(server_of(fake), TARGET, LINE, began, shares_memory=shares_memory)
    engine.start()
    fake.calls.clear()
    return engine


def update_calls(fake: FakeSglang) -> list[str]:
    paths = {*UPDATE, "/pause_generation", "/continue_generation"}
    return [path for path in fake.calls if path in paths]


def serves(fake: FakeSglang, version: str) -> bool:
    """Return whether the server holds and reports the version, and neither a pause nor an update is open."""
    return fake.holds(DRAFTS[version]) and fake.version == version and not fake.paused and not fake.open


def test_a_version_is_swapped_in_while_requests_are_paused(fake: FakeSglang) -> None:
    engine = engine_of(fake)
    swapped = engine.swap(DRAFTS["2"], "2")
    assert update_calls(fake) == ["/pause_generation", *UPDATE, "/continue_generation"]
    assert serves(fake, "2")
    assert (swapped.version, swapped.in_flight, engine.health().speculator) == ("2", 2, "2")
    assert swapped.pause_ms > 0


def test_equal_weights_are_renamed_without_a_pause(fake: FakeSglang) -> None:
    engine = engine_of(fake)
    swapped = engine.swap(DRAFTS["1"], "7")
    assert (update_calls(fake), swapped.pause_ms, fake.version) == ([], 0.0, "7")
    assert fake.holds(DRAFTS["1"])


@pytest.mark.parametrize("checksum", [weights.checksum_cpu, weights.checksum_gpu])
@pytest.mark.parametrize("ranks", [1, 2])
def test_checksums_of_any_device_and_of_several_ranks_are_supported(
    fake: FakeSglang, checksum: object, ranks: int
) -> None:
    fake.checksum, fake.ranks = checksum, ranks  # type: ignore[assignment]
    engine_of(fake).swap(DRAFTS["2"], "2")
    assert serves(fake, "2")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_local_server_takes_weights_from_shared_memory(fake: FakeSglang, ranks: int) -> None:
    fake.ranks = ranks
    engine = engine_of(fake, shares_memory=True)
    engine.swap(DRAFTS["2"], "2")
    assert serves(fake, "2")
    shared = fake.received
    engine_of(fake).swap(DRAFTS["3"], "3")
    assert shared < fake.received / 2


def test_without_shared_memory_weights_are_sent_by_http(fake: FakeSglang, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_tensors: object) -> str:
        raise RuntimeError("unable to allocate shared memory")

    monkeypatch.setattr(remote_engine, "serialize_shared", full)
    engine_of(fake, shares_memory=True).swap(DRAFTS["2"], "2")
    assert serves(fake, "2")


def test_after_a_failed_update_weights_are_sent_by_http(fake: FakeSglang) -> None:
    engine = engine_of(fake, shares_memory=True)
    fake.faults = {"/begin_weight_update": [BROKEN]}
    with pytest.raises(ServerError, match="version 1 still serves"):
        engine.swap(DRAFTS["2"], "2")
    engine.swap(DRAFTS["2"], "2")
    assert serves(fake, "2")
    assert fake.received > 5000


@pytest.mark.parametrize("path", ["/pause_generation", *UPDATE, "/weights_checker"])
@pytest.mark.parametrize("fault", [REJECTED, BROKEN, None])
def test_a_failed_call_restores_the_version_before(fake: FakeSglang, path: str, fault: object) -> None:
    engine = engine_of(fake)
    before = [] if path != "/weights_checker" else [(200, {"ranks": [fake.rank(0)]})]
    fake.faults = {path: [*before, fault]}  # type: ignore[list-item]
    with pytest.raises(ServerError, match=r"version 2 is not served: .*; version 1 still serves") as failed:
        engine.swap(DRAFTS["2"], "2")
    assert serves(fake, "1")
    health = engine.health()
    assert (health.speculator, health.error, health.alive) == ("1", str(failed.value), True)
    engine.swap(DRAFTS["3"], "3")
    assert serves(fake, "3")
    assert engine.health().error is None


def test_weights_that_did_not_arrive_are_detected_and_rolled_back(fake: FakeSglang) -> None:
    engine = engine_of(fake)
    fake.spoiled = {"midlayer.mlp.up_proj.weight"}
    with pytest.raises(ServerError, match=r"than were sent: .*gate_up_proj.weight; version 1 still serves"):
        engine.swap(DRAFTS["2"], "2")
    assert serves(fake, "1")


def test_a_failed_rollback_is_reported_and_requests_resume(fake: FakeSglang) -> None:
    engine = engine_of(fake)
    fake.faults = {"/update_weights_from_tensor": [None, BROKEN]}
    with pytest.raises(ServerError, match=r"the version before could not be restored: .*it broke"):
        engine.swap(DRAFTS["2"], "2")
    assert not fake.paused
    unknown = engine_of(fake, served=None)
    fake.faults = {"/weights_checker": [BROKEN]}
    with pytest.raises(ServerError, match="it broke"):
        unknown.swap(DRAFTS["3"], "3")
    fake.faults = {"/begin_weight_update": [BROKEN]}
    with pytest.raises(ServerError, match="it is not known which draft serves now"):
        unknown.swap(DRAFTS["3"], "3")
    assert not fake.paused


def test_requests_left_paused_resume_with_the_next_swap(fake: FakeSglang, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_engine, "_RETRY_S", 0.0)
    engine = engine_of(fake)
    fake.faults = {"/continue_generation": [BROKEN] * 3}
    with pytest.raises(ServerError, match="continue_generation"):
        engine.swap(DRAFTS["2"], "2")
    assert fake.paused
    engine.swap(DRAFTS["2"], "2")
    assert serves(fake, "2")


@pytest.mark.parametrize("open_", [True, False])
def test_a_starting_node_repairs_an_interrupted_swap(fake: FakeSglang, open_: bool) -> None:
    fake.paused, fake.open = True, open_
    engine = engine_of(fake)
    assert serves(fake, "1")
    engine.swap(DRAFTS["2"], "2")
    assert serves(fake, "2")


def test_a_wrong_key_is_reported_with_the_name_of_the_setting(fake: FakeSglang) -> None:
    with pytest.raises(ServerError, match=r"sglang\.api_key"):
        server_of(fake, key="open").info()


def test_an_unreachable_server_is_reported_with_its_address() -> None:
    server = SglangServer("http://127.0.0.1:1", SecretStr(""), timeout_s=5)
    assert not server.is_healthy()
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:1/server_info"):
        server.info()


def test_a_server_with_several_replicas_is_rejected(fake: FakeSglang) -> None:
    fake.replicas = 2
    with pytest.raises(ServerError, match="--dp-size 1"):
        engine_of(fake)


def test_invalid_responses_are_reported(fake: FakeSglang) -> None:
    fake.faults = {"/model_info": [(200, "<html>"), (200, [1])]}
    for message in ("no JSON", "no object"):
        with pytest.raises(ServerError, match=message):
            server_of(fake).info()


def test_health_counts_the_ended_requests(fake: FakeSglang) -> None:
    engine = engine_of(fake)
    health = engine.health()
    assert (health.alive, health.requests_running, health.requests_waiting, health.draft_depth) == (True, 2, 1, 3)
    assert (health.verify_steps, health.draft_tokens, health.accepted_tokens, health.output_tokens) == (
        40,
        90,
        60,
        103,
    )
    assert (engine.finished, engine.failed) == (3, 0)
    rows = engine.counts()
    assert (rows.captured, rows.published, rows.rows_dropped, rows.pending) == (50, 40, 7, 3)
    assert engine.circuit_breaker == "open"


def test_speculation_cannot_be_switched_off(fake: FakeSglang) -> None:
    engine = engine_of(fake)
    engine.speculate(on=True)
    with pytest.raises(SpeculationFixedError, match=r"serve\.speculate"):
        engine.speculate(on=False)


def test_a_draft_with_values_that_are_not_finite_is_rejected(fake: FakeSglang) -> None:
    engine, bad = engine_of(fake), random_draft(DRAFTS["1"].shape, seed=9)
    engine.check(bad)
    with torch.no_grad():
        bad.fc.weight.fill_(torch.inf)
    with pytest.raises(CheckpointError, match="not finite"):
        engine.check(bad)


def test_a_version_with_another_draft_vocabulary_than_the_servers_is_rejected(fake: FakeSglang, tmp_path: Path) -> None:
    shape = DRAFTS["1"].shape
    other = random_draft(shape, 1, 2 * torch.arange(shape.draft_vocab_size))
    write_checkpoint(other, tmp_path, TARGET, line=LINE)
    fake.draft = str(tmp_path)
    engine = engine_of(fake, other)
    engine.check(random_draft(shape, 2, 2 * torch.arange(shape.draft_vocab_size)))
    with pytest.raises(CheckpointError, match=r"another draft vocabulary.*restart the server"):
        engine.check(DRAFTS["2"])
    fake.draft = str(tmp_path / "gone")
    with pytest.raises(ServerError, match="--speculative-draft-model-path is not readable"):
        engine_of(fake, other)


def test_the_version_poller_follows_the_alias(fake: FakeSglang) -> None:
    engine, registry, seconds = engine_of(fake), FakeRegistry(), [0.0]
    poller = VersionPoller(registry, engine, Settings(), monotonic=lambda: seconds[-1])
    registry.alias = "2"
    poller.poll()
    assert serves(fake, "2")
    fake.faults = {"/begin_weight_update": [BROKEN]}
    registry.alias = "3"
    poller.poll()
    assert "version 2 still serves" in str(poller.update_blocked)
    assert serves(fake, "2")
    seconds.append(600.0)
    poller.poll()
    assert serves(fake, "3")
    assert (poller.update_blocked, [swap.version for swap in poller.swaps]) == (None, ["2", "3"])
    registry.foreign = {"4"}
    registry.alias = "4"
    poller.poll()
    assert serves(fake, "3")
    assert [rejected.version for rejected in poller.rejected] == ["4"]
