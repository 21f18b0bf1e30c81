"""The node follows the alias, refuses what is at fault for good, and asks again when the registry is away."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import CheckpointError, line_of, shape_for_target
from schemas.speculator.network import EagleDraft, random_draft
from serving.engine import Swapped
from serving.puller import LONGEST_WAIT_S, Puller, RegistryError, wait_after, wanted

SHAPE = shape_for_target(
    {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "vocab_size": 32,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "num_hidden_layers": 8,
    },
    draft_vocabulary=16,
)
TARGET = "f" * 32
DRAFTS = {str(n): random_draft(SHAPE, seed=n) for n in range(1, 5)}
LINE = line_of(TARGET, SHAPE, DRAFTS["1"].d2t)


@dataclass
class FakeRegistry:
    alias: str | None = None
    away: bool = False
    foreign: set[str] = field(default_factory=set)
    downloads: list[str] = field(default_factory=list)

    def named(self, alias: str) -> str | None:
        assert alias == "champion"
        if self.away:
            raise RegistryError("connection refused")
        return self.alias

    def download(self, version: str, folder: Path) -> Path:
        self.downloads.append(version)
        if self.away:
            raise RegistryError("connection reset")
        checkpoint.write(DRAFTS[version], folder / "draft", TARGET if version not in self.foreign else "0" * 32)
        return folder / "draft"


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
    assert (puller.error, engine.versions, puller.refused) == (None, ["1"], ())


def test_a_swap_that_fails_is_tried_again(puller: Puller, registry: FakeRegistry, engine: FakeEngine) -> None:
    registry.alias, engine.broken = "1", True
    puller.poll()
    assert puller.error == "the engine is stopping"
    engine.broken = False
    puller.poll()
    assert (engine.versions, puller.refused) == (["1"], ())


@given(
    named=st.none() | st.sampled_from("123"),
    served=st.none() | st.sampled_from("123"),
    refused=st.sets(st.sampled_from("123")),
)
def test_only_what_the_alias_names_is_wanted(named: str | None, served: str | None, refused: set[str]) -> None:
    version = wanted(named, served, refused)
    assert version in (None, named)
    assert version is None or (version != served and version not in refused)
    assert version is not None or named is None or named == served or named in refused


@given(failures=st.integers(0, 10_000), poll_s=st.floats(0.01, 600))
def test_waits_grow_with_failures_and_stay_bounded(failures: int, poll_s: float) -> None:
    assert poll_s <= wait_after(failures, poll_s) <= max(poll_s, LONGEST_WAIT_S)
    assert wait_after(failures, poll_s) <= wait_after(failures + 1, poll_s)
    assert wait_after(0, poll_s) == poll_s
