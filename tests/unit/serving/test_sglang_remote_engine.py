"""Versions go into SGLang's server whole or not at all, and whatever fails, it serves on and the node says what."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fake_sglang import KEY, FakeSglang, served
from pydantic import SecretStr
from version_registry import DRAFTS, LINE, TARGET, FakeRegistry

from schemas.settings import Settings
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft, random_draft
from serving.engines.base import SpeculationFixedError
from serving.engines.sglang.node import remote_engine, weights
from serving.engines.sglang.node.client import SglangError, SglangServer
from serving.engines.sglang.node.remote_engine import RemoteEngine, ServedDraft
from serving.versions.poller import VersionPoller

UPDATE = ["/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"]
REFUSED = (400, {"success": False, "message": "not now"})
BROKEN = (500, {"message": "it broke"})


@pytest.fixture
def fake() -> Iterator[FakeSglang]:
    with served(FakeSglang(DRAFTS["1"], "1")) as running:
        yield running


def server_of(fake: FakeSglang, key: str = KEY) -> SglangServer:
    return SglangServer(fake.url, SecretStr(key), timeout_s=5)


def engine_of(fake: FakeSglang, known: EagleDraft | None = DRAFTS["1"], *, shares_memory: bool = False) -> RemoteEngine:
    began = ServedDraft("1", weights.draft_tensors(known)) if known else None
    engine = RemoteEngine(server_of(fake), TARGET, LINE, began, shares_memory=shares_memory)
    engine.start()
    fake.calls.clear()
    return engine


def changes(fake: FakeSglang) -> list[str]:
    told = {*UPDATE, "/pause_generation", "/continue_generation"}
    return [path for path in fake.calls if path in told]


def serves(fake: FakeSglang, version: str) -> bool:
    """Whether it holds the version whole, says so, and lets requests go on."""
    return fake.holds(DRAFTS[version]) and fake.version == version and not fake.paused and not fake.open


def test_a_version_goes_in_while_requests_stand_still(fake: FakeSglang) -> None:
    engine = engine_of(fake)
    swapped = engine.swap(DRAFTS["2"], "2")
    assert changes(fake) == ["/pause_generation", *UPDATE, "/continue_generation"]
    assert serves(fake, "2")
    assert (swapped.version, swapped.in_flight, engine.health().speculator) == ("2", 2, "2")
    assert swapped.pause_ms > 0


def test_a_version_that_is_there_already_makes_nobody_wait(fake: FakeSglang) -> None:
    engine = engine_of(fake)
    swapped = engine.swap(DRAFTS["1"], "7")
    assert (changes(fake), swapped.pause_ms, fake.version) == ([], 0.0, "7")
    assert fake.holds(DRAFTS["1"])


@pytest.mark.parametrize("form", [weights.checksum_cpu, weights.checksum_gpu])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_sums_of_any_device_and_of_several_ranks_are_understood(fake: FakeSglang, form: object, ranks: int) -> None:
    fake.checksum, fake.ranks = form, ranks  # type: ignore[assignment]
    engine_of(fake).swap(DRAFTS["2"], "2")
    assert serves(fake, "2")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_on_this_machine_takes_weights_from_its_memory(fake: FakeSglang, ranks: int) -> None:
    fake.ranks = ranks
    engine = engine_of(fake, shares_memory=True)
    engine.swap(DRAFTS["2"], "2")
    assert serves(fake, "2")
    shared = fake.received
    engine_of(fake).swap(DRAFTS["3"], "3")
    assert shared < fake.received / 2


def test_without_room_in_shared_memory_weights_go_over_the_wire(
    fake: FakeSglang, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_tensors: object) -> str:
        raise RuntimeError("unable to allocate shared memory")

    monkeypatch.setattr(remote_engine, "serialize_shared", full)
    engine_of(fake, shares_memory=True).swap(DRAFTS["2"], "2")
    assert serves(fake, "2")


def test_after_an_update_that_failed_weights_go_over_the_wire(fake: FakeSglang) -> None:
    engine = engine_of(fake, shares_memory=True)
    fake.faults = {"/begin_weight_update": [BROKEN]}
    with pytest.raises(SglangError, match="version 1 still serves"):
        engine.swap(DRAFTS["2"], "2")
    engine.swap(DRAFTS["2"], "2")
    assert serves(fake, "2")
    assert fake.received > 5000


@pytest.mark.parametrize("path", ["/pause_generation", *UPDATE, "/weights_checker"])
@pytest.mark.parametrize("fault", [REFUSED, BROKEN, None])
def test_a_step_that_fails_leaves_what_served_before(fake: FakeSglang, path: str, fault: object) -> None:
    engine = engine_of(fake)
    before = [] if path != "/weights_checker" else [(200, {"ranks": [{"checksums": fake.checksums()}]})]
    fake.faults = {path: [*before, fault]}  # type: ignore[list-item]
    with pytest.raises(SglangError, match=r"version 2 is not served: .*; version 1 still serves") as failed:
        engine.swap(DRAFTS["2"], "2")
    assert serves(fake, "1")
    health = engine.health()
    assert (health.speculator, health.error, health.alive) == ("1", str(failed.value), True)
    engine.swap(DRAFTS["3"], "3")
    assert serves(fake, "3")
    assert engine.health().error is None


def test_weights_that_did_not_arrive_are_noticed_and_taken_back(fake: FakeSglang) -> None:
    engine = engine_of(fake)
    fake.spoiled = {"midlayer.mlp.up_proj.weight"}
    with pytest.raises(SglangError, match=r"than were sent: .*gate_up_proj.weight; version 1 still serves"):
        engine.swap(DRAFTS["2"], "2")
    assert serves(fake, "1")


def test_where_nothing_can_be_put_back_that_is_said_and_requests_go_on(fake: FakeSglang) -> None:
    engine = engine_of(fake)
    fake.faults = {"/update_weights_from_tensor": [None, BROKEN]}
    with pytest.raises(SglangError, match=r"the version before could not be restored: .*it broke"):
        engine.swap(DRAFTS["2"], "2")
    assert not fake.paused
    unknown = engine_of(fake, known=None)
    fake.faults = {"/weights_checker": [BROKEN]}
    with pytest.raises(SglangError, match="it broke"):
        unknown.swap(DRAFTS["3"], "3")
    fake.faults = {"/begin_weight_update": [BROKEN]}
    with pytest.raises(SglangError, match="it is not known which draft serves now"):
        unknown.swap(DRAFTS["3"], "3")
    assert not fake.paused


def test_requests_that_stand_still_are_let_go_with_the_next_try(
    fake: FakeSglang, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_engine, "_RETRY_S", 0.0)
    engine = engine_of(fake)
    fake.faults = {"/continue_generation": [BROKEN] * 3}
    with pytest.raises(SglangError, match="continue_generation"):
        engine.swap(DRAFTS["2"], "2")
    assert fake.paused
    engine.swap(DRAFTS["2"], "2")
    assert serves(fake, "2")


@pytest.mark.parametrize("open_", [True, False])
def test_what_a_node_left_that_died_is_put_right_when_another_begins(fake: FakeSglang, open_: bool) -> None:
    fake.paused, fake.open = True, open_
    engine = engine_of(fake)
    assert serves(fake, "1")
    engine.swap(DRAFTS["2"], "2")
    assert serves(fake, "2")


def test_another_key_is_told_by_the_name_of_its_setting(fake: FakeSglang) -> None:
    with pytest.raises(SglangError, match=r"sglang\.api_key"):
        server_of(fake, key="open").info()


def test_a_server_that_is_away_is_told_by_its_address() -> None:
    server = SglangServer("http://127.0.0.1:1", SecretStr(""), timeout_s=5)
    assert not server.is_healthy()
    with pytest.raises(SglangError, match=r"http://127\.0\.0\.1:1/server_info"):
        server.info()


def test_a_server_of_several_replicas_is_not_looked_after(fake: FakeSglang) -> None:
    fake.replicas = 2
    with pytest.raises(SglangError, match="--dp-size 1"):
        engine_of(fake)


def test_answers_that_are_not_sglangs_are_told(fake: FakeSglang) -> None:
    fake.faults = {"/model_info": [(200, "<html>"), (200, [1])]}
    for what in ("no JSON", "no object"):
        with pytest.raises(SglangError, match=what):
            server_of(fake).info()


def test_health_is_what_the_server_counts_of_requests_that_have_ended(fake: FakeSglang) -> None:
    engine = engine_of(fake)
    health = engine.health()
    assert (health.alive, health.requests_running, health.requests_waiting, health.draft_depth) == (True, 2, 1, 3)
    assert (health.verify_steps, health.draft_tokens, health.accepted_tokens, health.output_tokens) == (
        40,
        120,
        60,
        103,
    )
    assert (engine.finished, engine.failed) == (3, 0)
    rows = engine.watch.counts()
    assert (rows.captured, rows.published, rows.rows_dropped, rows.pending) == (50, 40, 7, 3)
    assert engine.watch.circuit_breaker == "open"


def test_drafting_cannot_be_stopped_by_an_operator(fake: FakeSglang) -> None:
    engine = engine_of(fake)
    engine.speculate(on=True)
    with pytest.raises(SpeculationFixedError, match=r"serve\.speculate"):
        engine.speculate(on=False)


def test_a_draft_that_gives_no_numbers_is_refused(fake: FakeSglang) -> None:
    engine, bad = engine_of(fake), random_draft(DRAFTS["1"].shape, seed=9)
    engine.check(bad)
    with torch.no_grad():
        bad.fc.weight.fill_(torch.inf)
    with pytest.raises(CheckpointError, match="not finite"):
        engine.check(bad)


def test_the_puller_of_any_node_follows_the_alias_here_too(fake: FakeSglang) -> None:
    engine, registry = engine_of(fake), FakeRegistry()
    poller = VersionPoller(registry, engine, Settings())
    registry.alias = "2"
    poller.poll()
    assert serves(fake, "2")
    fake.faults = {"/begin_weight_update": [BROKEN] * 2}  # the poller tries once more at once
    registry.alias = "3"
    poller.poll()
    assert "version 2 still serves" in str(poller.error)
    assert serves(fake, "2")
    poller.poll()
    assert serves(fake, "3")
    assert (poller.error, [swap.version for swap in poller.swaps]) == (None, ["2", "3"])
    registry.foreign = {"4"}
    registry.alias = "4"
    poller.poll()
    assert serves(fake, "3")
    assert [refused.version for refused in poller.rejected] == ["4"]
