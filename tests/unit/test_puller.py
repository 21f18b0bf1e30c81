"""The node follows the alias, refuses what is at fault for good, and asks again when the registry is away."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from version_registry import DRAFTS, LINE, FakeRegistry

from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from serving.engine import Swapped
from serving.puller import (
    LONGEST_WAIT_S,
    Puller,
    RefusedError,
    RegistryError,
    UnknownVersionError,
    wait_after,
    wanted,
)


@dataclass
class FakeEngine:
    line: str = LINE
    served: list[tuple[str, EagleDraft]] = field(default_factory=list)
    broken: bool = False
    not_finite: bool = False

    def check(self, draft: EagleDraft) -> None:
        if self.not_finite:
            raise CheckpointError("the draft gives values that are not finite")

    def swap(self, draft: EagleDraft, version: str) -> Swapped:
        if self.broken:
            raise RuntimeError("the engine is stopping")
        self.served.append((version, draft))
        return Swapped(version, 3, 1.5)

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
def puller(registry: FakeRegistry, engine: FakeEngine) -> Puller:
    return Puller(registry, engine, "champion", 2.0)  # type: ignore[arg-type]


def test_without_an_alias_the_draft_stays(puller: Puller, engine: FakeEngine) -> None:
    puller.poll()
    assert (engine.served, puller.error, puller.swaps) == ([], None, ())


def test_a_version_is_swapped_in_once_with_its_weights(
    puller: Puller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias = "1"
    for _ in range(3):
        puller.poll()
    ((version, draft),) = engine.served
    assert (version, registry.downloads) == ("1", ["1"])
    assert torch.equal(draft.fc.weight, DRAFTS["1"].fc.weight.bfloat16().float())
    assert [(s.version, s.in_flight, s.pause_ms) for s in puller.swaps] == [("1", 3, 1.5)]


def test_the_alias_is_followed_back_to_an_older_version(
    puller: Puller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    for registry.alias in ("1", "3", "2"):
        puller.poll()
    assert engine.versions == ["1", "3", "2"]


def test_an_alias_that_is_taken_away_leaves_the_draft(
    puller: Puller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    for registry.alias in ("1", None, "1"):
        puller.poll()
    assert engine.versions == ["1"]


def test_a_version_of_another_line_is_refused_for_good_and_the_next_one_served(
    puller: Puller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.foreign = {"2"}
    for registry.alias in ("1", "2", "2", "2", "3"):
        puller.poll()
    assert (engine.versions, registry.downloads) == (["1", "3"], ["1", "2", "3"])
    (refusal,) = puller.refused
    assert refusal.version == "2"
    assert "speculator line" in refusal.why
    assert puller.error is None


def test_a_draft_that_fails_the_smoke_test_is_refused(
    puller: Puller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias, engine.not_finite = "1", True
    puller.poll()
    assert engine.served == []
    assert "not finite" in puller.refused[0].why


def test_a_registry_that_is_away_is_told_and_forgotten_when_it_is_back(
    puller: Puller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias, registry.away = "1", True
    puller.poll()
    assert puller.error == "connection refused"
    registry.away = False
    puller.poll()
    assert puller.error is None
    assert (engine.versions, puller.refused) == (["1"], ())


def test_a_swap_that_fails_is_tried_again(puller: Puller, registry: FakeRegistry, engine: FakeEngine) -> None:
    registry.alias, engine.broken = "1", True
    puller.poll()
    assert puller.error == "the engine is stopping"
    engine.broken = False
    puller.poll()
    assert (engine.versions, puller.refused) == (["1"], ())


@pytest.fixture
def running(puller: Puller) -> Iterator[Puller]:
    puller.start()
    yield puller
    puller.stop()


def test_a_pinned_version_stays_while_the_alias_moves_and_goes_when_unpinned(
    running: Puller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    running.pin("2").result(10)
    assert (running.pinned, engine.versions) == ("2", ["2"])
    registry.alias = "3"
    running.poll()
    assert (running.named, engine.versions) == ("3", ["2"])
    running.unpin().result(10)
    assert (running.pinned, engine.versions) == (None, ["2", "3"])


def test_what_is_served_already_is_pinned_without_a_swap(
    running: Puller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    registry.alias = "1"
    running.poll()
    running.pin("1").result(10)
    assert (running.pinned, registry.downloads, engine.versions) == ("1", ["1"], ["1"])


def test_a_pin_that_fails_says_why_and_leaves_the_pin_before(
    running: Puller, registry: FakeRegistry, engine: FakeEngine
) -> None:
    running.pin("1").result(10)
    registry.foreign = {"2"}
    with pytest.raises(RefusedError, match=r"version 2 is refused: .*speculator line"):
        running.pin("2").result(10)
    with pytest.raises(UnknownVersionError, match="no version '9'"):
        running.pin("9").result(10)
    registry.away = True
    with pytest.raises(RegistryError, match="connection refused"):
        running.pin("3").result(10)
    registry.away, engine.broken = False, True
    with pytest.raises(RuntimeError, match="stopping"):
        running.pin("3").result(10)
    assert (running.pinned, engine.versions) == ("1", ["1"])


def test_orders_are_carried_out_in_their_order(running: Puller, engine: FakeEngine) -> None:
    orders = [running.pin("1"), running.unpin(), running.pin("2"), running.pin("3")]
    for order in orders:
        order.result(10)
    assert (running.pinned, engine.versions) == ("3", ["1", "2", "3"])


VERSIONS = st.none() | st.sampled_from("123")


@given(named=VERSIONS, pinned=VERSIONS, served=VERSIONS, refused=st.sets(st.sampled_from("123")))
def test_only_what_is_pinned_or_else_named_is_wanted(
    named: str | None, pinned: str | None, served: str | None, refused: set[str]
) -> None:
    meant = named if pinned is None else pinned
    version = wanted(named, pinned, served, refused)
    assert version in (None, meant)
    assert version is None or (version != served and version not in refused)
    assert version is not None or meant is None or meant == served or meant in refused


@given(failures=st.integers(0, 10_000), poll_s=st.floats(0.01, 600))
def test_waits_grow_with_failures_and_stay_bounded(failures: int, poll_s: float) -> None:
    assert poll_s <= wait_after(failures, poll_s) <= max(poll_s, LONGEST_WAIT_S)
    assert wait_after(failures, poll_s) <= wait_after(failures + 1, poll_s)
    assert wait_after(0, poll_s) == poll_s
