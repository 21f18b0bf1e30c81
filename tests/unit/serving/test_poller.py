"""The node follows the alias, refuses what is at fault for good, and asks again when the registry is away."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from api_node import eventually
from hypothesis import given
from hypothesis import strategies as st
from idle_health import IDLE
from version_registry import DRAFTS, LINE, FakeRegistry

from schemas.settings import Canary, Serve, Settings, Update
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from serving.engines.base import EngineHealth, SwapResult
from serving.versions.alias_policy import is_canary_slice, slice_number
from serving.versions.cache import RegistryError, RejectedVersionError, UnknownVersionError
from serving.versions.poller import MAX_POLL_DELAY_S, VersionPoller, poll_delay


@dataclass
class FakeEngine:
    line: str = LINE
    served: list[tuple[str, EagleDraft]] = field(default_factory=list)
    broken: bool = False
    not_finite: bool = False

    def check(self, draft: EagleDraft) -> None:
        if self.not_finite:
            raise CheckpointError("the draft gives values that are not finite")

    def health(self) -> EngineHealth:
        return IDLE

    def swap(self, draft: EagleDraft, version: str) -> SwapResult:
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


def test_an_alias_that_nobody_records_is_followed_back_to_an_older_version(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    for registry.alias in ("1", "3", "2"):
        poller.poll()
    assert engine.versions == ["1", "3", "2"]


def test_a_recorded_alias_is_followed_back_when_the_record_says_so(
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


def test_old_answers_are_passed_over_and_counted(
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


def test_a_record_that_cannot_be_read_counts_as_none_and_is_told(
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


def test_an_alias_that_is_taken_away_leaves_the_draft(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    for registry.alias in ("1", None, "1"):
        poller.poll()
    assert engine.versions == ["1"]


def test_a_version_of_another_line_is_refused_for_good_and_the_next_one_served(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.foreign = {"2"}
    for registry.alias in ("1", "2", "2", "2", "3"):
        poller.poll()
    assert (engine.versions, registry.downloads) == (["1", "3"], ["1", "2", "3"])
    (refusal,) = poller.rejected
    assert refusal.version == "2"
    assert "speculator line" in refusal.why
    assert poller.error is None


def test_a_draft_that_fails_the_smoke_test_is_refused(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias, engine.not_finite = "1", True
    poller.poll()
    assert engine.served == []
    assert "not finite" in poller.rejected[0].why


def test_a_registry_that_is_away_is_told_and_forgotten_when_it_is_back(
    poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias, registry.unreachable = "1", True
    poller.poll()
    assert poller.error == "connection refused"
    registry.unreachable = False
    poller.poll()
    assert poller.error is None
    assert (engine.versions, poller.rejected) == (["1"], ())


def test_an_outage_of_any_length_is_made_good_by_the_first_answer_after_it(
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


def test_a_swap_that_fails_is_tried_again(poller: VersionPoller, registry: FakeRegistry, engine: FakeEngine) -> None:
    registry.alias, engine.broken = "1", True
    poller.poll()
    assert poller.error == "the engine is stopping"
    engine.broken = False
    poller.poll()
    assert (engine.versions, poller.rejected) == (["1"], ())


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def go_to_slice_of(self, role: str) -> None:
        """Move on to the next slice in which that role's turn is on ``node-0``."""
        self.now += SLICE_S
        while is_canary_slice("node-0", slice_number(self.now, SLICE_S), SHARE) != (role == "canary"):
            self.now += SLICE_S


SHARE, SLICE_S = 0.5, 30.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def trying(registry: FakeRegistry, engine: FakeEngine, clock: Clock) -> VersionPoller:
    registry.alias, registry.canary = "1", "2"
    return VersionPoller(registry, engine, Settings(canary=Canary(share=SHARE, slice_duration=SLICE_S)), clock)  # type: ignore[arg-type]


def test_a_canary_is_served_in_its_slices_and_the_champion_in_the_others(
    trying: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    served = []
    for role in ("champion", "canary", "canary", "champion", "canary"):
        clock.go_to_slice_of(role)
        trying.poll()
        assert trying.role == role
        served.append(engine.versions[-1])
    assert served == ["1", "2", "2", "1", "2"]
    assert (trying.alias_version, trying.canary) == ("1", "2")
    assert registry.downloads == ["1", "2"]


def test_a_canary_that_is_over_ends_at_once(
    trying: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    clock.go_to_slice_of("canary")
    trying.poll()
    registry.canary = None
    trying.poll()
    assert (engine.versions[-1], trying.role, trying.canary) == ("1", "champion", None)
    assert registry.downloads == ["1", "2"]


def test_a_canary_that_is_over_ends_though_the_next_champion_cannot_be_fetched(
    trying: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    clock.go_to_slice_of("canary")
    trying.poll()
    registry.alias, registry.canary, registry.broken = "3", None, True
    trying.poll()
    assert (engine.versions[-1], trying.role, trying.error) == ("1", "champion", "connection reset")
    registry.broken = False
    trying.poll()
    assert engine.versions[-1] == "3"


def test_a_canary_that_became_champion_stays(
    trying: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    clock.go_to_slice_of("canary")
    trying.poll()
    for registry.canary in ("2", None):
        registry.alias = "2"
        trying.poll()
        assert (engine.versions[-1], trying.role, trying.canary) == ("2", "champion", None)
    assert registry.downloads == ["1", "2"]


def test_a_canary_at_fault_is_refused_and_the_champion_serves_its_slices(
    trying: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    registry.foreign = {"2"}
    clock.go_to_slice_of("canary")
    trying.poll()
    assert (engine.versions, trying.role, trying.canary) == (["1"], "champion", None)
    assert [refusal.version for refusal in trying.rejected] == ["2"]


def test_without_a_champion_there_is_nothing_to_try_a_canary_against(
    trying: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    registry.alias = None
    clock.go_to_slice_of("canary")
    trying.poll()
    assert (engine.versions, trying.role) == ([], None)


@pytest.mark.parametrize(
    ("serve", "share", "version"),
    [(Serve(), 0.0, "1"), (Serve(alias="canary"), 1.0, "2"), (Serve(alias="mine"), 1.0, None), (Serve(), 1.0, "2")],
)
def test_only_a_node_that_follows_the_champion_takes_part_in_trials(
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
def lazy(registry: FakeRegistry, engine: FakeEngine, clock: Clock) -> VersionPoller:
    """Takes a newer version over once a minute at most."""
    settings = Settings(update=Update(min_interval=60.0, jitter=0.0), canary=Canary(share=1.0))
    return VersionPoller(registry, engine, settings, clock, clock)  # type: ignore[arg-type]


def test_newer_versions_are_taken_over_once_an_interval_and_only_then_fetched(
    lazy: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    for clock.now, registry.alias in ((0, "1"), (1, "2"), (2, "3"), (60, "4"), (61, "4")):
        lazy.poll()
    assert (engine.versions, registry.downloads, lazy.pending_version) == (["1", "2", "4"], ["1", "2", "4"], None)
    registry.alias = "3"
    lazy.poll()
    assert engine.versions[-1] == "3"
    registry.alias = "4"
    lazy.poll()
    assert (engine.versions[-1], lazy.pending_version) == ("3", "4")
    registry.alias = "3"
    lazy.poll()
    assert lazy.pending_version is None


def test_a_canary_and_its_end_wait_for_no_interval(
    lazy: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    for registry.alias in ("1", "2"):
        lazy.poll()
    for registry.canary in ("4", None):
        clock.now += 1
        lazy.poll()
    assert engine.versions == ["1", "2", "4", "2"]


def test_a_canary_that_became_champion_is_not_left_for_an_interval(
    lazy: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    for registry.alias in ("1", "2"):
        lazy.poll()
    registry.canary = "4"
    lazy.poll()
    registry.alias, registry.canary = "4", None
    lazy.poll()
    assert (engine.versions, lazy.role) == (["1", "2", "4"], "champion")


def test_turns_are_taken_on_time_while_the_registry_does_not_answer(registry: FakeRegistry, engine: FakeEngine) -> None:
    registry.alias, registry.canary = "1", "2"
    settings = Settings(serve=Serve(poll_interval=0.01), canary=Canary(share=0.5, slice_duration=0.05))
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
def running(poller: VersionPoller) -> Iterator[VersionPoller]:
    poller.start()
    yield poller
    poller.stop()


def test_a_pinned_version_stays_while_the_alias_moves_and_goes_when_unpinned(
    running: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    running.pin("2").result(10)
    assert (running.pinned, engine.versions) == ("2", ["2"])
    registry.alias = "3"
    running.poll()
    assert (running.alias_version, engine.versions) == ("3", ["2"])
    running.unpin().result(10)
    assert (running.pinned, engine.versions) == (None, ["2", "3"])


def test_a_pinned_version_is_above_a_canary(
    trying: VersionPoller, registry: FakeRegistry, engine: FakeEngine, clock: Clock
) -> None:
    clock.go_to_slice_of("canary")
    trying.start()
    trying.pin("3").result(10)
    trying.poll()
    assert (engine.versions[-1], trying.role) == ("3", "pinned")
    trying.unpin().result(10)
    assert (engine.versions[-1], trying.role) == ("2", "canary")
    trying.stop()


def test_what_is_served_already_is_pinned_without_a_swap(
    running: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias = "1"
    running.poll()
    running.pin("1").result(10)
    assert (running.pinned, registry.downloads, engine.versions) == ("1", ["1"], ["1"])


def test_a_pin_that_fails_says_why_and_leaves_the_pin_before(
    running: VersionPoller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    running.pin("1").result(10)
    registry.foreign = {"2"}
    with pytest.raises(RejectedVersionError, match=r"version 2 is rejected: .*speculator line"):
        running.pin("2").result(10)
    with pytest.raises(UnknownVersionError, match="no version '9'"):
        running.pin("9").result(10)
    registry.unreachable = True
    with pytest.raises(RegistryError, match="connection refused"):
        running.pin("3").result(10)
    registry.unreachable, engine.broken = False, True
    with pytest.raises(RuntimeError, match="stopping"):
        running.pin("3").result(10)
    assert (running.pinned, engine.versions) == ("1", ["1"])


def test_orders_are_carried_out_in_their_order(running: VersionPoller, engine: FakeEngine) -> None:
    orders = [running.pin("1"), running.unpin(), running.pin("2"), running.pin("3")]
    for order in orders:
        order.result(10)
    assert (running.pinned, engine.versions) == ("3", ["1", "2", "3"])


@given(failures=st.integers(0, 10_000), poll_s=st.floats(0.01, 600))
def test_waits_grow_with_failures_and_stay_bounded(failures: int, poll_s: float) -> None:
    assert poll_s <= poll_delay(failures, poll_s) <= max(poll_s, MAX_POLL_DELAY_S)
    assert poll_delay(failures, poll_s) <= poll_delay(failures + 1, poll_s)
    assert poll_delay(0, poll_s) == poll_s
