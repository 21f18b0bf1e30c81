"""Alias moves leave legal states only, after crashes and with concurrent movers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, cast

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.delta import DeltaLog
from schemas.batches import TABLES
from schemas.events import QUARANTINED_TAG, Alias, AliasIntent, AliasMoved
from trainer.release.alias_moves import (
    AliasMover,
    MoveError,
    find_next_change,
    find_rollback_target,
    new_intent,
    plan_anchor,
    plan_canary,
    plan_promotion,
    plan_rollback,
)
from trainer.release.registry import SpeculatorRegistry, Version

LINE = "target-draft"
VERSIONS = st.sampled_from(["1", "2", "3", "4"])
ALIASES = st.dictionaries(st.sampled_from(["champion", "previous", "canary", "candidate"]), VERSIONS)


class Crash(BaseException):
    """The process ends here."""


class MemoryIntents:
    """The table of intents, as commits in memory."""

    def __init__(self) -> None:
        self.commits: list[pa.Table] = []

    def version(self, name: str) -> int:
        return len(self.commits)

    def read_added(self, name: str, after_version: int, up_to_version: int) -> pa.Table:
        return pa.concat_tables([TABLES[name].empty_table(), *self.commits[after_version:up_to_version]])

    def append_after(self, name: str, version: int, rows: pa.Table) -> bool:
        if version != len(self.commits):
            return False
        self.commits.append(rows)
        return True


class MemoryAliases:
    """A registry that consists of its aliases."""

    def __init__(self, named: Mapping[str, str]) -> None:
        self.named = dict(named)
        self.deleted: set[str] = set()

    def aliases(self, line: str) -> Mapping[str, str]:
        return dict(self.named)

    def set_alias(self, line: str, alias: Alias, version: str) -> None:
        self.named[alias] = version

    def version(self, line: str, number: str) -> Version | None:
        return None if number in self.deleted else Version(number, datetime.now(UTC), {}, "", "")

    def delete_alias(self, line: str, alias: Alias) -> None:
        self.named.pop(alias, None)


def mover_of(rows: MemoryIntents, registry: MemoryAliases) -> AliasMover:
    return AliasMover(cast(DeltaLog, rows), cast(SpeculatorRegistry, registry))


def crash_after(thing: Any, steps: int, names: tuple[str, ...]) -> Callable[[], int]:
    """Crash before the call after so many calls of some methods; return a function that counts the calls."""
    made = 0

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal made
            if made == steps:
                raise Crash
            made += 1
            return method(*arguments)

        return call

    for name in names:
        setattr(thing, name, guarded(getattr(thing, name)))
    return lambda: made


def wanted(changes: list[Any], why: str = "better") -> AliasIntent:
    return new_intent(LINE, "promote", changes, actor="promoter", why=why)


def after(named: Mapping[str, str], move: AliasIntent) -> dict[str, str]:
    """The aliases when all is done."""
    to = {**named, **{change.alias: change.to_version for change in move.changes}}
    return {alias: version for alias, version in to.items() if version is not None}


def test_a_promotion_makes_the_champion_previous_and_removes_the_canary() -> None:
    named = {"champion": "1", "previous": "0", "canary": "2", "candidate": "2"}
    promoted = plan_promotion(named, "2", watched=False)
    assert after(named, wanted(promoted)) == {"champion": "2", "previous": "1", "candidate": "2"}


def test_while_promotions_are_watched_previous_keeps_the_anchor() -> None:
    named = {"champion": "3", "previous": "1"}
    for version in ("4", "1"):
        promoted = plan_promotion(named, version, watched=True)
        assert after(named, wanted(promoted)) == {"champion": version, "previous": "1"}
    assert after({"champion": "1"}, wanted(plan_promotion({"champion": "1"}, "2", watched=True))) == {
        "champion": "2",
        "previous": "1",
    }


def test_the_end_of_a_watch_makes_the_champion_the_anchor() -> None:
    named = {"champion": "3", "previous": "1"}
    assert after(named, wanted(plan_anchor(named))) == {"champion": "3", "previous": "3"}


def test_the_first_champion_has_no_previous() -> None:
    assert after({"candidate": "1"}, wanted(plan_promotion({"candidate": "1"}, "1", watched=False))) == {
        "champion": "1",
        "candidate": "1",
    }


def test_previous_moves_before_the_champion() -> None:
    first, second = wanted(plan_promotion({"champion": "1", "previous": "0"}, "2", watched=False)).changes
    assert (first.alias, first.to_version) == ("previous", "1")
    assert (second.alias, second.to_version) == ("champion", "2")


def previous_moves(*versions: str) -> list[AliasMoved]:
    return [
        AliasMoved(
            time=datetime.now(UTC),
            line=LINE,
            alias="previous",
            from_version=before,
            to_version=version,
            actor="promoter",
            why="better",
            figures={},
        )
        for before, version in zip([None, *versions], versions, strict=False)
    ]


def test_a_rollback_returns_to_previous_and_ends_a_canary() -> None:
    named = {"champion": "3", "previous": "2", "canary": "4"}
    assert find_rollback_target(named, previous_moves("1", "2"), []) == "2"
    back = wanted(plan_rollback(named, "2"))
    assert after(named, back) == {"champion": "2", "previous": "2"}


def test_a_champion_that_came_through_its_watch_is_rolled_back_to_the_anchor_before_it() -> None:
    named, moves = {"champion": "3", "previous": "3"}, previous_moves("1", "2", "3")
    bad = Version("2", datetime.now(UTC), {QUARANTINED_TAG: "worse"}, "", "")
    assert find_rollback_target(named, moves, []) == "2"
    assert find_rollback_target(named, moves, [bad]) == "1"
    assert find_rollback_target(named, previous_moves("3"), []) is None
    assert find_rollback_target({"champion": "1"}, [], []) is None
    first, second = wanted(plan_rollback(named, "2")).changes
    assert (first.alias, second.alias) == ("previous", "champion"), "no node may serve version 3 as an anchor"


@settings(deadline=None)
@given(ALIASES, VERSIONS, st.booleans())
def test_the_changes_of_an_intent_end_in_its_aliases(named: dict[str, str], version: str, watched: bool) -> None:
    move, now = wanted(plan_promotion(named, version, watched=watched)), dict(named)
    for _ in move.changes:
        change = find_next_change(move, now)
        assert change is not None
        now = after(now, move.model_copy(update={"changes": (change,)}))
    assert find_next_change(move, now) is None
    assert now == after(named, move)


def test_an_alias_moved_by_hand_stops_the_move() -> None:
    move = wanted(plan_promotion({"champion": "1"}, "2", watched=False))
    with pytest.raises(MoveError, match="names version 7, but named 1"):
        find_next_change(move, {"champion": "7", "previous": "1"})


@settings(deadline=None)
@given(named=ALIASES, version=VERSIONS, steps=st.integers(0, 8))
def test_after_a_crash_at_any_step_the_next_mover_leaves_one_of_two_legal_states(
    named: dict[str, str], version: str, steps: int
) -> None:
    rows, registry = MemoryIntents(), MemoryAliases(named)
    mover = mover_of(rows, registry)
    move = wanted(plan_promotion(named, version, watched=False))
    crash_after(registry, steps, ("set_alias", "delete_alias"))
    crashed = False
    try:
        mover.move(move)
    except Crash:
        crashed = True
    survivor = mover_of(rows, fresh := MemoryAliases(registry.named))
    survivor.finish_open(LINE)
    assert fresh.named == after(named, move)
    assert survivor.find_open(LINE) is None
    if move.changes:
        assert [state for _, state in survivor.intents(LINE)] == ["done"]
        assert crashed is (steps < len(move.changes))


@settings(deadline=None)
@given(steps=st.integers(0, 1))
def test_after_a_crash_around_a_row_the_move_is_made_or_not_begun(steps: int) -> None:
    named = {"champion": "1"}
    rows, registry = MemoryIntents(), MemoryAliases(named)
    move = wanted(plan_promotion(named, "2", watched=False))
    crash_after(rows, steps, ("append_after",))
    with pytest.raises(Crash):
        mover_of(rows, registry).move(move)
    left = MemoryIntents()
    left.commits = rows.commits
    survivor = mover_of(left, registry)
    survivor.finish_open(LINE)
    assert registry.named == (named if steps == 0 else {"champion": "2", "previous": "1"})
    assert [state for _, state in survivor.intents(LINE)] == ([] if steps == 0 else ["done"])


def test_one_of_two_movers_with_the_same_state_wins() -> None:
    rows, registry = MemoryIntents(), MemoryAliases({"champion": "1"})
    one, other = mover_of(rows, registry), mover_of(rows, registry)
    assert one.find_open(LINE) is other.find_open(LINE) is None
    one.move(wanted(plan_promotion(registry.named, "2", watched=False)))
    with pytest.raises(MoveError, match="by hand meanwhile"):
        other.move(wanted(plan_promotion({"champion": "1"}, "3", watched=False)))
    assert registry.named == {"champion": "2", "previous": "1"}


def test_a_mover_whose_row_comes_second_writes_nothing() -> None:
    rows, registry = MemoryIntents(), MemoryAliases({"champion": "1"})
    slow = mover_of(rows, registry)
    read_aliases = registry.aliases

    def meanwhile(line: str) -> Mapping[str, str]:
        registry.aliases = read_aliases  # type: ignore[method-assign]
        mover_of(rows, registry).move(wanted(plan_canary(registry.named, "5")))
        return read_aliases(line)

    registry.aliases = meanwhile  # type: ignore[method-assign]
    with pytest.raises(MoveError, match="another move came first"):
        slow.move(wanted(plan_promotion({"champion": "1"}, "3", watched=False)))
    assert registry.named == {"champion": "1", "canary": "5"}


def test_while_a_move_is_open_no_other_begins() -> None:
    rows, registry = MemoryIntents(), MemoryAliases({"champion": "1"})
    crash_after(registry, 1, ("set_alias",))
    with pytest.raises(Crash):
        mover_of(rows, registry).move(wanted(plan_promotion(registry.named, "2", watched=False), why="the newest"))
    with pytest.raises(MoveError, match="is being moved: the newest"):
        mover_of(rows, MemoryAliases(registry.named)).move(wanted(plan_canary({}, "3")))


def test_a_move_crossed_by_hand_is_abandoned_with_a_reason() -> None:
    rows, registry = MemoryIntents(), MemoryAliases({"champion": "1"})
    crash_after(registry, 1, ("set_alias",))
    with pytest.raises(Crash):
        mover_of(rows, registry).move(wanted(plan_promotion(registry.named, "2", watched=False)))
    by_hand = MemoryAliases({**registry.named, "champion": "9"})
    survivor = mover_of(rows, by_hand)
    survivor.finish_open(LINE)
    assert by_hand.named["champion"] == "9"
    assert [state for _, state in survivor.intents(LINE)] == ["abandoned"]
    assert "names version 9" in str(rows.commits[-1]["note"][0])


def test_a_move_that_changes_nothing_is_not_written() -> None:
    rows = MemoryIntents()
    mover_of(rows, MemoryAliases({"champion": "2"})).move(wanted(plan_promotion({"champion": "2"}, "2", watched=False)))
    assert rows.commits == []


def test_a_move_to_a_version_that_was_deleted_does_not_block_the_line() -> None:
    rows, registry = MemoryIntents(), MemoryAliases({"champion": "1"})
    crash_after(registry, 1, ("set_alias",))
    with pytest.raises(Crash):
        mover_of(rows, registry).move(wanted(plan_promotion(registry.named, "2", watched=False)))
    survivor = mover_of(rows, without := MemoryAliases(registry.named))
    without.deleted = {"2"}
    survivor.finish_open(LINE)
    assert [state for _, state in survivor.intents(LINE)] == ["abandoned"]
    survivor.move(wanted(plan_promotion(without.named, "3", watched=False)))
    assert without.named == {"champion": "3", "previous": "1"}
