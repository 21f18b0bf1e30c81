"""Moves of aliases: legal states only, whatever crashes, whoever else moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.batches import TABLES
from schemas.events import Alias, AliasIntent
from trainer.release.alias_moves import MoveError, Mover, intent, next_change, promotion, rollback, trial

LINE = "target-draft"
VERSIONS = st.sampled_from(["1", "2", "3", "4"])
ALIASES = st.dictionaries(st.sampled_from(["champion", "previous", "canary", "candidate"]), VERSIONS)


class Crash(BaseException):
    """The process ends here."""


class Rows:
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


class Aliases:
    """A registry that is its aliases."""

    def __init__(self, named: Mapping[str, str]) -> None:
        self.named = dict(named)
        self.gone: set[str] = set()

    def aliases(self, line: str) -> Mapping[str, str]:
        return dict(self.named)

    def point(self, line: str, alias: Alias, version: str) -> None:
        self.named[alias] = version

    def has(self, line: str, version: str) -> bool:
        return version not in self.gone

    def unpoint(self, line: str, alias: Alias) -> None:
        self.named.pop(alias, None)


def dying_after(thing: Any, steps: int, names: tuple[str, ...]) -> Callable[[], int]:
    """Let so many calls of some methods be made, and kill the process before the next; gives how many were made."""
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
    return intent(LINE, "promote", changes, actor="promoter", why=why)


def after(named: Mapping[str, str], move: AliasIntent) -> dict[str, str]:
    """The aliases when all is done."""
    to = {**named, **{change.alias: change.to_version for change in move.changes}}
    return {alias: version for alias, version in to.items() if version is not None}


def test_a_promotion_leaves_the_champion_as_the_way_back_and_ends_its_trial() -> None:
    named = {"champion": "1", "previous": "0", "canary": "2", "candidate": "2"}
    assert after(named, wanted(promotion(named, "2"))) == {"champion": "2", "previous": "1", "candidate": "2"}


def test_the_first_champion_has_nothing_to_go_back_to() -> None:
    assert after({"candidate": "1"}, wanted(promotion({"candidate": "1"}, "1"))) == {"champion": "1", "candidate": "1"}


def test_there_is_a_way_back_before_the_champion_moves() -> None:
    first, second = wanted(promotion({"champion": "1", "previous": "0"}, "2")).changes
    assert (first.alias, first.to_version) == ("previous", "1")
    assert (second.alias, second.to_version) == ("champion", "2")


def test_a_rollback_goes_to_previous_and_the_next_one_further_back() -> None:
    named = {"champion": "3", "previous": "2", "canary": "4"}
    assert after(named, wanted(rollback(named, before="1"))) == {"champion": "2", "previous": "1"}
    assert after(named, wanted(rollback(named, before=None))) == {"champion": "2"}


@settings(deadline=None)
@given(ALIASES, VERSIONS)
def test_what_is_to_be_moved_ends_when_all_is_as_wanted(named: dict[str, str], version: str) -> None:
    move, now = wanted(promotion(named, version)), dict(named)
    for _ in move.changes:
        change = next_change(move, now)
        assert change is not None
        now = after(now, move.model_copy(update={"changes": (change,)}))
    assert next_change(move, now) is None
    assert now == after(named, move)


def test_an_alias_that_somebody_moved_meanwhile_stops_the_move() -> None:
    move = wanted(promotion({"champion": "1"}, "2"))
    with pytest.raises(MoveError, match="names version 7, and was 1"):
        next_change(move, {"champion": "7", "previous": "1"})


@settings(deadline=None)
@given(named=ALIASES, version=VERSIONS, steps=st.integers(0, 8))
def test_after_a_crash_at_any_step_the_next_mover_leaves_one_of_two_legal_states(
    named: dict[str, str], version: str, steps: int
) -> None:
    rows, registry = Rows(), Aliases(named)
    mover = Mover(rows, registry)
    move = wanted(promotion(named, version))
    dying_after(registry, steps, ("point", "unpoint"))
    crashed = False
    try:
        mover.move(move)
    except Crash:
        crashed = True
    survivor = Mover(rows, fresh := Aliases(registry.named))
    survivor.finish(LINE)
    assert fresh.named == after(named, move)
    assert survivor.open(LINE) is None
    if move.changes:
        assert [state for _, state in survivor.intents(LINE)] == ["done"]
        assert crashed is (steps < len(move.changes))


@settings(deadline=None)
@given(steps=st.integers(0, 1))
def test_a_crash_around_the_rows_is_before_the_move_or_behind_it(steps: int) -> None:
    named = {"champion": "1"}
    rows, registry = Rows(), Aliases(named)
    move = wanted(promotion(named, "2"))
    dying_after(rows, steps, ("append_after",))
    with pytest.raises(Crash):
        Mover(rows, registry).move(move)
    left = Rows()
    left.commits = rows.commits
    survivor = Mover(left, registry)
    survivor.finish(LINE)
    assert registry.named == (named if steps == 0 else {"champion": "2", "previous": "1"})
    assert [state for _, state in survivor.intents(LINE)] == ([] if steps == 0 else ["done"])


def test_of_two_movers_that_decide_on_the_same_state_one_wins() -> None:
    rows, registry = Rows(), Aliases({"champion": "1"})
    one, other = Mover(rows, registry), Mover(rows, registry)
    assert one.open(LINE) is other.open(LINE) is None
    one.move(wanted(promotion(registry.named, "2")))
    with pytest.raises(MoveError, match="by hand meanwhile"):
        other.move(wanted(promotion({"champion": "1"}, "3")))
    assert registry.named == {"champion": "2", "previous": "1"}


def test_a_mover_whose_row_comes_second_writes_nothing() -> None:
    rows, registry = Rows(), Aliases({"champion": "1"})
    slow = Mover(rows, registry)
    asked = registry.aliases

    def meanwhile(line: str) -> Mapping[str, str]:
        registry.aliases = asked  # type: ignore[method-assign]
        Mover(rows, registry).move(wanted(trial(registry.named, "5")))
        return asked(line)

    registry.aliases = meanwhile  # type: ignore[method-assign]
    with pytest.raises(MoveError, match="another move came first"):
        slow.move(wanted(promotion({"champion": "1"}, "3")))
    assert registry.named == {"champion": "1", "canary": "5"}


def test_while_a_move_is_open_no_other_begins() -> None:
    rows, registry = Rows(), Aliases({"champion": "1"})
    dying_after(registry, 1, ("point",))
    with pytest.raises(Crash):
        Mover(rows, registry).move(wanted(promotion(registry.named, "2"), why="the newest"))
    with pytest.raises(MoveError, match="is being moved: the newest"):
        Mover(rows, Aliases(registry.named)).move(wanted(trial({}, "3")))


def test_a_move_that_a_hand_crossed_is_abandoned_and_says_why() -> None:
    rows, registry = Rows(), Aliases({"champion": "1"})
    dying_after(registry, 1, ("point",))
    with pytest.raises(Crash):
        Mover(rows, registry).move(wanted(promotion(registry.named, "2")))
    by_hand = Aliases({**registry.named, "champion": "9"})
    survivor = Mover(rows, by_hand)
    survivor.finish(LINE)
    assert by_hand.named["champion"] == "9"
    assert [state for _, state in survivor.intents(LINE)] == ["abandoned"]
    assert "names version 9" in survivor.notes(LINE)[-1]


def test_a_move_that_changes_nothing_is_not_written() -> None:
    rows = Rows()
    Mover(rows, Aliases({"champion": "2"})).move(wanted(promotion({"champion": "2"}, "2")))
    assert rows.commits == []


def test_a_move_to_a_version_that_was_deleted_does_not_block_the_line() -> None:
    rows, registry = Rows(), Aliases({"champion": "1"})
    dying_after(registry, 1, ("point",))
    with pytest.raises(Crash):
        Mover(rows, registry).move(wanted(promotion(registry.named, "2")))
    survivor = Mover(rows, without := Aliases(registry.named))
    without.gone = {"2"}
    survivor.finish(LINE)
    assert [state for _, state in survivor.intents(LINE)] == ["abandoned"]
    survivor.move(wanted(promotion(without.named, "3")))
    assert without.named == {"champion": "3", "previous": "1"}
