"""The version poller: aliases, canary slices, updates, pins, defective versions, and an unreachable registry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from api_node import eventually
from hypothesis import given
from hypothesis import strategies as st
from idle_health import IDLE
from structlog.testing import capture_logs
from version_registry import DRAFTS, LINE, FakeRegistry

from schemas.settings import Canary, Serve, Settings, Update
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from serving.engines.base import EngineHealth, SwapResult
from serving.versions.active_version import MAX_RETRY_DELAY_S
from serving.versions.alias_policy import is_anchor_slice, is_canary_slice, slice_number
from serving.versions.cache import RegistryError, RejectedVersionError, UnknownVersionError
from serving.versions.poller import MAX_POLL_DELAY_S, VersionPoller, poll_delay


@dataclass
class FakeEngine:
    line: str = LINE
    served: list[tuple[str, EagleDraft]] = field(default_factory=list)
    broken: bool = False
    swap_calls: int = 0
    not_finite: bool = False

    def check(self, draft: EagleDraft) -> None:
        if self.not_finite:
            raise CheckpointError("the draft gives values that are not finite")

    def health(self) -> EngineHealth:
        return IDLE

    def swap(self, draft: EagleDraft, version: str) -> SwapResult:
        self.swap_calls += 1
        if self.broken:
            raise RuntimeError("the engine is stopping")
        self.served.append((version, draft))
        return SwapResult(version, 3, 1.5)

    @property
    def versions(self) -> list[str]:
        return [version for version, _ in self.served]


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def poller(registry: FakeRegistry, engine: FakeEngine) -> VersionPoller:
    return VersionPoller(registry, engine, Settings())  # type: ignore[arg-type]


def test_without_an_alias_the_draft_stays(poller: VersionPoller, engine: FakeEngine) -> None:
    poller.poll()
    assert (engine.served, poller.error, poller.swaps) == ([], None, ())


def test_a_version_is_swapped_in_once_with_its_weights(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias = "1"
    for _ in range(3):
        poller.poll()
    ((version, draft),) = engine.served
    assert (version, registry.downloads) == ("1", ["1"])
    assert torch.equal(draft.fc.weight, DRAFTS["1"].fc.weight.bfloat16().float())
    assert [(s.version, s.in_flight, s.pause_ms) for s in poller.swaps] == [("1", 3, 1.5)]


def test_an_unrecorded_alias_is_followed_back_to_an_older_version(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    for registry.alias in ("1", "3", "2"):
        poller.poll()
    assert engine.versions == ["1", "3", "2"]


def test_a_recorded_alias_is_followed_back_only_with_a_newer_audit_state(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias = "3"
    registry.record_audit()
    poller.poll()
    registry.alias = "2"
    poller.poll()
    assert (engine.versions, poller.alias_version) == (["3"], "2")
    assert poller.update_blocked is not None
    assert "not newer than 3" in poller.update_blocked
    registry.record_audit()
    poller.poll()
    assert (engine.versions, poller.update_blocked) == (["3", "2"], None)


def test_stale_answers_are_ignored_and_counted(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias = "1"
    registry.record_audit()
    before = registry.audited
    poller.poll()
    registry.alias = "2"
    registry.record_audit()
    poller.poll()
    for registry.audited in (before, None):
        for registry.alias in ("1", "4", None):
            poller.poll()
    assert (engine.versions, poller.alias_version, poller.stale_count, poller.error) == (["1", "2"], "2", 6, None)


def test_an_unreadable_audit_state_counts_as_none_and_is_reported(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.unreadable = "tag aurora.audited: not JSON"
    for registry.alias in ("1", "3", "2"):
        poller.poll()
    assert (engine.versions, poller.update_blocked) == (["1", "3", "2"], registry.unreadable)
    malformed = {sample.name: sample.value for metric in poller.collect() for sample in metric.samples}
    assert malformed["aurora_serve_registry_malformed_responses_total"] == 3
    registry.unreadable = None
    poller.poll()
    assert poller.update_blocked is None


def test_a_deleted_alias_keeps_the_draft(poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine) -> None:
    for registry.alias in ("1", None, "1"):
        poller.poll()
    assert engine.versions == ["1"]


def test_a_version_of_another_line_is_rejected_for_good_and_the_next_one_served(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.foreign = {"2"}
    for registry.alias in ("1", "2", "2", "2", "3"):
        poller.poll()
    assert (engine.versions, registry.downloads) == (["1", "3"], ["1", "2", "3"])
    (rejected,) = poller.rejected
    assert rejected.version == "2"
    assert "speculator line" in rejected.why
    assert poller.error is None


def test_a_draft_that_fails_the_smoke_test_is_rejected(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias, engine.not_finite = "1", True
    poller.poll()
    assert engine.served == []
    assert "not finite" in poller.rejected[0].why


def test_an_unreachable_registry_is_reported_until_it_answers(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias, registry.unreachable = "1", True
    poller.poll()
    assert poller.error == "connection refused"
    registry.unreachable = False
    poller.poll()
    assert poller.error is None
    assert (engine.versions, poller.rejected) == (["1"], ())


def test_the_first_answer_after_an_outage_is_followed(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias = "1"
    registry.record_audit()
    poller.poll()
    registry.unreachable = True
    for _ in range(5000):
        poller.poll()
    assert (engine.versions, poller.error) == (["1"], "connection refused")
    registry.unreachable, registry.alias = False, "2"
    registry.record_audit()
    poller.poll()
    assert (engine.versions, poller.error) == (["1", "2"], None)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def advance_to_slice_of(self, role: str) -> None:
        """Advance to the next slice in which ``node-0`` serves the role."""
        self.now += SLICE_S
        while role_of(slice_number(self.now, SLICE_S)) != role:
            self.now += SLICE_S


def role_of(number: int) -> str:
    """Return what ``node-0`` serves in a slice while there are a canary and an anchor."""
    if is_canary_slice("node-0", number, SHARE):
        return "canary"
    return "previous" if is_anchor_slice("node-0", number, ANCHOR_SHARE) else "champion"


def metrics(poller: VersionPoller) -> dict[str, float]:
    return {sample.name: sample.value for metric in poller.collect() for sample in metric.samples}


def test_a_failing_swap_is_retried_less_and_less_often_with_one_log_line(
    registry: FakeRegistry, engine: FakeEngine
) -> None:
    clock = Clock()
    settings = Settings(serve=Serve(poll_interval=2.0))
    poller = VersionPoller(registry, engine, settings, monotonic=clock)  # type: ignore[arg-type]
    registry.alias = "1"
    poller.poll()
    registry.alias, engine.broken = "2", True
    tried: list[float] = []
    with capture_logs() as logs:
        for _ in range(2000):
            before = engine.swap_calls
            poller.poll()
            if engine.swap_calls > before:
                tried.append(clock.now)
            clock.now += 1
    assert tried[:5] == [0, 2, 6, 14, 30]
    assert max(later - earlier for earlier, later in pairwise(tried)) == MAX_RETRY_DELAY_S
    assert len(registry.downloads) == 1 + len(tried), "one download for each try"
    assert [entry["version"] for entry in logs if entry["event"] == "swap_failed"] == ["2"]
    assert not [entry for entry in logs if entry["event"].startswith("poll_")]
    assert (engine.versions, poller.error, poller.rejected) == (["1"], None, ())
    assert poller.update_blocked == "the swap to version 2 fails: the engine is stopping"
    assert metrics(poller)["aurora_serve_version_swap_failures_total"] == len(tried)
    engine.broken = False
    clock.now += MAX_RETRY_DELAY_S
    poller.poll()
    assert (engine.versions, poller.update_blocked) == (["1", "2"], None)


def test_another_version_is_tried_at_once_after_a_failed_swap(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias, engine.broken = "1", True
    poller.poll()
    engine.broken = False
    poller.poll()
    assert engine.versions == []
    registry.alias = "2"
    poller.poll()
    assert (engine.versions, poller.update_blocked) == (["2"], None)


def test_a_pin_is_tried_at_once_after_a_failed_swap(
    running_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias, engine.broken = "1", True
    running_poller.poll()
    engine.broken = False
    running_poller.pin("1").result(10)
    assert (engine.versions, running_poller.pinned) == (["1"], "1")


SHARE, ANCHOR_SHARE, SLICE_S = 0.5, 0.2, 30.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def canary_poller(registry: FakeRegistry, engine: FakeEngine, clock: Clock) -> VersionPoller:
    registry.alias, registry.canary = "1", "2"
    return VersionPoller(registry, engine, Settings(canary=Canary(share=SHARE, slice_duration=SLICE_S)), clock)  # type: ignore[arg-type]


def test_a_canary_is_served_in_its_slices_and_the_champion_in_the_others(
    canary_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    served = []
    for role in ("champion", "canary", "canary", "champion", "canary"):
        clock.advance_to_slice_of(role)
        canary_poller.poll()
        assert canary_poller.role == role
        served.append(engine.versions[-1])
    assert served == ["1", "2", "2", "1", "2"]
    assert (canary_poller.alias_version, canary_poller.canary) == ("1", "2")
    assert registry.downloads == ["1", "2"]


def test_a_canary_ends_at_once(
    canary_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    clock.advance_to_slice_of("canary")
    canary_poller.poll()
    registry.canary = None
    canary_poller.poll()
    assert (engine.versions[-1], canary_poller.role, canary_poller.canary) == ("1", "champion", None)
    assert registry.downloads == ["1", "2"]


def test_a_canary_ends_although_the_next_champion_cannot_be_downloaded(
    canary_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    clock.advance_to_slice_of("canary")
    canary_poller.poll()
    registry.alias, registry.canary, registry.broken = "3", None, True
    canary_poller.poll()
    assert (engine.versions[-1], canary_poller.role, canary_poller.error) == ("1", "champion", "connection reset")
    registry.broken = False
    canary_poller.poll()
    assert engine.versions[-1] == "3"


def test_a_promoted_canary_stays_active(
    canary_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    clock.advance_to_slice_of("canary")
    canary_poller.poll()
    for registry.canary in ("2", None):
        registry.alias = "2"
        canary_poller.poll()
        assert (engine.versions[-1], canary_poller.role, canary_poller.canary) == ("2", "champion", None)
    assert registry.downloads == ["1", "2"]


def test_a_defective_canary_is_rejected_and_the_champion_serves_its_slices(
    canary_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    registry.foreign = {"2"}
    clock.advance_to_slice_of("canary")
    canary_poller.poll()
    assert (engine.versions, canary_poller.role, canary_poller.canary) == (["1"], "champion", None)
    assert [rejected.version for rejected in canary_poller.rejected] == ["2"]


def test_without_a_champion_a_canary_is_not_served(
    canary_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    registry.alias = None
    clock.advance_to_slice_of("canary")
    canary_poller.poll()
    assert (engine.versions, canary_poller.role) == ([], None)


@pytest.mark.parametrize(
    ("serve", "share", "version"),
    [(Serve(), 0.0, "1"), (Serve(alias="canary"), 1.0, "2"), (Serve(alias="mine"), 1.0, None), (Serve(), 1.0, "2")],
)
def test_only_a_node_that_follows_the_champion_serves_canaries(
    registry: FakeRegistry, engine: FakeEngine, clock: Clock, serve: Serve, share: float, version: str | None
) -> None:
    registry.alias, registry.canary = "1", "2"
    settings = Settings(serve=serve, canary=Canary(share=share, slice_duration=SLICE_S))
    poller = VersionPoller(registry, engine, settings, clock)  # type: ignore[arg-type]
    for _ in range(10):
        clock.now += SLICE_S
        poller.poll()
    assert engine.versions[-1:] == ([] if version is None else [version])


@pytest.fixture
def lazy_poller(registry: FakeRegistry, engine: FakeEngine, clock: Clock) -> VersionPoller:
    """A poller that updates once a minute at most."""
    settings = Settings(update=Update(min_interval=60.0, jitter=0.0), canary=Canary(share=1.0))
    return VersionPoller(registry, engine, settings, clock, clock)  # type: ignore[arg-type]


def test_newer_versions_are_downloaded_once_per_interval(
    lazy_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    for clock.now, registry.alias in ((0, "1"), (1, "2"), (2, "3"), (60, "4"), (61, "4")):
        lazy_poller.poll()
    assert (engine.versions, registry.downloads, lazy_poller.pending_version) == (
        ["1", "2", "4"],
        ["1", "2", "4"],
        None,
    )
    registry.alias = "3"
    lazy_poller.poll()
    assert engine.versions[-1] == "3"
    registry.alias = "4"
    lazy_poller.poll()
    assert (engine.versions[-1], lazy_poller.pending_version) == ("3", "4")
    registry.alias = "3"
    lazy_poller.poll()
    assert lazy_poller.pending_version is None


def test_a_canary_and_its_end_are_not_delayed(
    lazy_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    for registry.alias in ("1", "2"):
        lazy_poller.poll()
    for registry.canary in ("4", None):
        clock.now += 1
        lazy_poller.poll()
    assert engine.versions == ["1", "2", "4", "2"]


def test_the_update_to_a_promoted_canary_is_not_delayed(
    lazy_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    for registry.alias in ("1", "2"):
        lazy_poller.poll()
    registry.canary = "4"
    lazy_poller.poll()
    registry.alias, registry.canary = "4", None
    lazy_poller.poll()
    assert (engine.versions, lazy_poller.role) == (["1", "2", "4"], "champion")


@pytest.fixture
def watch_poller(registry: FakeRegistry, engine: FakeEngine, clock: Clock) -> VersionPoller:
    """A poller of a line whose champion, version 2, is watched against version 1."""
    registry.alias, registry.previous = "2", "1"
    settings = Settings(canary=Canary(share=SHARE, anchor_share=ANCHOR_SHARE, slice_duration=SLICE_S))
    return VersionPoller(registry, engine, settings, clock)  # type: ignore[arg-type]


def test_an_anchor_a_canary_and_the_champion_are_served_each_in_its_slices(
    watch_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    for role, version in (("champion", "2"), ("previous", "1"), ("canary", "2"), ("previous", "1")):
        clock.advance_to_slice_of(role)
        watch_poller.poll()
        served_as = "champion" if role == "canary" else role
        assert (engine.versions[-1], watch_poller.role, watch_poller.anchor) == (version, served_as, "1")
    registry.canary = "3"
    for role, version in (("champion", "2"), ("canary", "3"), ("previous", "1"), ("champion", "2")):
        clock.advance_to_slice_of(role)
        watch_poller.poll()
        assert (engine.versions[-1], watch_poller.role) == (version, role)
    assert sorted(registry.downloads) == ["1", "2", "3"]


def test_versions_promoted_during_a_watch_are_swapped_in_beside_the_anchor(
    watch_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    clock.advance_to_slice_of("previous")
    for registry.alias in ("2", "3", "4"):
        watch_poller.poll()
        assert (engine.versions[-1], watch_poller.role) == ("1", "previous")
    clock.advance_to_slice_of("champion")
    watch_poller.poll()
    assert (engine.versions[-1], watch_poller.role) == ("4", "champion")
    assert registry.downloads == ["2", "1", "3", "4"]


@pytest.mark.parametrize(("champion", "anchor"), [("2", "2"), ("1", "1"), ("2", None)])
def test_an_anchor_ends_at_once_when_the_watch_does(
    watch_poller: VersionPoller,
    registry: FakeRegistry,
    engine: FakeEngine,
    clock: Clock,
    champion: str,
    anchor: str | None,
) -> None:
    registry.record_audit()
    clock.advance_to_slice_of("previous")
    watch_poller.poll()
    assert engine.versions[-1] == "1"
    registry.alias, registry.previous = champion, anchor
    registry.record_audit()
    watch_poller.poll()
    assert (engine.versions[-1], watch_poller.role, watch_poller.anchor) == (champion, "champion", None)


def test_a_node_without_an_anchor_share_serves_no_anchor(
    registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    registry.alias, registry.previous = "2", "1"
    settings = Settings(canary=Canary(anchor_share=0, slice_duration=SLICE_S))
    poller = VersionPoller(registry, engine, settings, clock)  # type: ignore[arg-type]
    clock.advance_to_slice_of("previous")
    poller.poll()
    assert (engine.versions, poller.anchor, registry.downloads) == (["2"], None, ["2"])


def test_slices_are_served_on_time_while_the_registry_does_not_answer(
    registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias, registry.canary = "1", "2"
    settings = Settings(serve=Serve(poll_interval=0.01), canary=Canary(share=0.5, slice_duration=0.05, burn_in=0))
    poller = VersionPoller(registry, engine, settings)  # type: ignore[arg-type]
    poller.start()
    eventually(lambda: poller.canary == "2" and registry.downloads == ["1", "2"])
    registry.answering.clear()
    swaps = len(poller.swaps)
    eventually(lambda: len(poller.swaps) >= swaps + 4)
    registry.answering.set()
    poller.stop()
    assert {swap.version for swap in poller.swaps[swaps:]} == {"1", "2"}


@pytest.fixture
def running_poller(poller: VersionPoller) -> Iterator[VersionPoller]:
    poller.start()
    yield poller
    poller.stop()


def test_a_pinned_version_stays_active_until_it_is_unpinned(
    running_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    running_poller.pin("2").result(10)
    assert (running_poller.pinned, engine.versions) == ("2", ["2"])
    registry.alias = "3"
    running_poller.poll()
    assert (running_poller.alias_version, engine.versions) == ("3", ["2"])
    running_poller.unpin().result(10)
    assert (running_poller.pinned, engine.versions) == (None, ["2", "3"])


def test_a_pin_overrides_a_canary(
    canary_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    clock.advance_to_slice_of("canary")
    canary_poller.start()
    canary_poller.pin("3").result(10)
    canary_poller.poll()
    assert (engine.versions[-1], canary_poller.role) == ("3", "pinned")
    canary_poller.unpin().result(10)
    assert (engine.versions[-1], canary_poller.role) == ("2", "canary")
    canary_poller.stop()


def test_the_active_version_is_pinned_without_a_swap(
    running_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias = "1"
    running_poller.poll()
    running_poller.pin("1").result(10)
    assert (running_poller.pinned, registry.downloads, engine.versions) == ("1", ["1"], ["1"])


def test_a_failed_pin_reports_the_reason_and_keeps_the_pin_before(
    running_poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    running_poller.pin("1").result(10)
    registry.foreign = {"2"}
    with pytest.raises(RejectedVersionError, match=r"version 2 is rejected: .*speculator line"):
        running_poller.pin("2").result(10)
    with pytest.raises(UnknownVersionError, match="no version '9'"):
        running_poller.pin("9").result(10)
    registry.unreachable = True
    with pytest.raises(RegistryError, match="connection refused"):
        running_poller.pin("3").result(10)
    registry.unreachable, engine.broken = False, True
    with pytest.raises(RuntimeError, match="stopping"):
        running_poller.pin("3").result(10)
    assert (running_poller.pinned, engine.versions) == ("1", ["1"])


def test_pins_are_executed_in_order(running_poller: VersionPoller, engine: FakeEngine) -> None:
    requests = [running_poller.pin("1"), running_poller.unpin(), running_poller.pin("2"), running_poller.pin("3")]
    for request in requests:
        request.result(10)
    assert (running_poller.pinned, engine.versions) == ("3", ["1", "2", "3"])


@given(failures=st.integers(0, 10_000), poll_s=st.floats(0.01, 600))
def test_delays_grow_with_failures_and_stay_bounded(failures: int, poll_s: float) -> None:
    assert poll_s <= poll_delay(failures, poll_s) <= max(poll_s, MAX_POLL_DELAY_S)
    assert poll_delay(failures, poll_s) <= poll_delay(failures + 1, poll_s)
    assert poll_delay(0, poll_s) == poll_s
