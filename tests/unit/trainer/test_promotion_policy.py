"""The next action of the promoter follows from recorded moves and live figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from schemas.events import Alias, AliasIntent, AliasMoved
from schemas.settings import Canary, Promoter
from trainer.release.gate import Verdict
from trainer.release.live_figures import ServingPeriod
from trainer.release.promotion_policy import (
    CanaryAnalysis,
    LineState,
    LiveComparisons,
    NextAction,
    PostPromotionWatch,
    choose_action,
    find_canary_analysis,
    find_cooldown_end,
    find_watch,
)
from trainer.release.sequential_test import Comparison, Estimate

NOW = 1_000_000.0
SETTINGS = Promoter(canary_timeout=1000, watch_duration=600, cooldown=100, cooldown_window=10_000)
PASSED, FAILED = Verdict(promote=True, why="better"), Verdict(promote=False, why="not better")
ANALYSIS = CanaryAnalysis("3", "2", NOW - 100, NOW + 900)
WATCH = PostPromotionWatch((ServingPeriod("3", NOW - 100),), "2", NOW + 500)


def moved(alias: Alias, before: str | None, after: str | None, ago: float = 100) -> AliasMoved:
    time = datetime.fromtimestamp(NOW - ago, UTC)
    return AliasMoved(
        time=time, line="l", alias=alias, from_version=before, to_version=after, actor="promoter", why="", figures={}
    )


def replace_time(move: AliasMoved, ago: float) -> AliasMoved:
    return move.model_copy(update={"time": datetime.fromtimestamp(NOW - ago, UTC)})


def state_of(
    gate: Verdict = FAILED,
    moves: Sequence[AliasMoved] = (),
    quarantined: Sequence[str] = (),
    rollbacks: Sequence[float] = (),
    **aliases: str,
) -> LineState:
    return LineState(aliases, moves, [rollback(ago) for ago in rollbacks], quarantined, gate)


def rollback(ago: float, actor: str = "promoter", state: str = "done") -> tuple[AliasIntent, str]:
    time = datetime.fromtimestamp(NOW - ago, UTC)
    wanted = AliasIntent(id="i", time=time, line="l", action="rollback", changes=(), actor=actor, why="", figures={})
    return wanted, state


def estimate(difference: float, width: float = 0.01, **named: object) -> Estimate:
    """Return an acceptance length over all labels, with the evidence that its interval implies."""
    plain = Estimate(
        "acceptance length",
        None,
        1 + difference,
        1.0,
        difference,
        difference - width,
        difference + width,
        better=9.0 if difference - width > -0.05 else -9.0,
        worse=9.0 if difference + width < 0 else -9.0,
        share=0.25,
    )
    return replace(plain, **named)  # type: ignore[arg-type]


def comparison(
    length: float, per_second: float | None = None, width: float = 0.01, *, enough: bool = True
) -> Comparison:
    overall = estimate(length, width)
    seconds = estimate(length if per_second is None else per_second, width, figure="tokens per second")
    return Comparison(500, 500, enough=enough, overall=(seconds, overall))


NO_COMPARISON = LiveComparisons()


def action(
    at: LineState, live: LiveComparisons = NO_COMPARISON, share: float = 0.1, settings: Promoter = SETTINGS
) -> NextAction:
    return choose_action(at, live, NOW, Canary(share=share), settings)


CANDIDATE = {"candidate": "3", "champion": "2"}


@pytest.mark.parametrize(
    ("at", "share", "expected"),
    [
        (state_of(PASSED, **CANDIDATE), 0.1, "start_canary"),
        (state_of(PASSED, **CANDIDATE), 0.0, "promote"),
        (state_of(PASSED, candidate="3"), 0.1, "promote"),
        (state_of(FAILED, **CANDIDATE), 0.1, "wait"),
        (state_of(PASSED, [moved("canary", None, "3")], **CANDIDATE), 0.1, "wait"),
        (state_of(PASSED, [moved("canary", None, "3")], **CANDIDATE), 0.0, "promote"),
        (state_of(PASSED, [moved("champion", None, "3")], **CANDIDATE), 0.1, "wait"),
        (state_of(PASSED, rollbacks=[50], **CANDIDATE), 0.1, "wait"),
        (state_of(PASSED, rollbacks=[150], **CANDIDATE), 0.1, "start_canary"),
        (state_of(PASSED, canary="1", **CANDIDATE), 0.0, "promote"),
    ],
)
def test_a_candidate_that_passed_the_gate_becomes_canary_or_champion_once(
    at: LineState, share: float, expected: str
) -> None:
    found = action(at, share=share)
    assert found.kind == expected
    assert found.version == (None if expected == "wait" else "3")
    assert not found.quarantine


@pytest.mark.parametrize(
    ("compared", "expected", "quarantine"),
    [
        (comparison(0.0), "promote", False),
        (comparison(0.0, width=0.1), "wait", False),
        (comparison(-0.2), "end_canary", True),
        (comparison(0.0, enough=False), "wait", False),
        (comparison(0.0, per_second=-0.2), "end_canary", True),
    ],
)
def test_a_canary_is_promoted_rolled_back_or_continues(compared: Comparison, expected: str, quarantine: bool) -> None:
    found = action(state_of(canary="3", **CANDIDATE), LiveComparisons(canary=(ANALYSIS, compared)))
    assert (found.kind, found.quarantine) == (expected, quarantine)
    if expected != "wait":
        assert found.figures["acceptance_length_difference"] == compared.overall[1].difference


def test_an_undecided_canary_analysis_ends_as_canary_on_timeout_says() -> None:
    at = state_of(canary="3", **CANDIDATE)
    over = replace(ANALYSIS, until=NOW)
    undecided, below = comparison(-0.04, width=0.1), comparison(-0.06, width=0.1)
    ended = action(at, LiveComparisons(canary=(over, undecided)))
    assert (ended.kind, ended.version, ended.quarantine) == ("end_canary", "3", False)
    by_estimate = SETTINGS.model_copy(update={"canary_on_timeout": "estimate"})
    assert action(at, LiveComparisons(canary=(over, undecided)), settings=by_estimate).kind == "promote"
    assert action(at, LiveComparisons(canary=(over, below)), settings=by_estimate).kind == "end_canary"
    too_few = comparison(0.1, width=0.5, enough=False)
    assert action(at, LiveComparisons(canary=(over, too_few)), settings=by_estimate).kind == "end_canary"


def test_a_better_canary_waits_during_the_cooldown() -> None:
    at = state_of(canary="3", rollbacks=[50], **CANDIDATE)
    found = action(at, LiveComparisons(canary=(ANALYSIS, comparison(0.0))))
    assert found.kind == "wait"
    assert "cooldown" in found.why


def test_a_canary_in_quarantine_or_without_another_champion_is_ended() -> None:
    assert action(
        state_of(canary="3", quarantined=["3"], **CANDIDATE), LiveComparisons(canary=(ANALYSIS, comparison(0.0)))
    ).kind == ("end_canary")
    assert action(state_of(canary="3", champion="3")).kind == "end_canary"


def test_a_canary_analysis_begins_with_the_last_move_of_canary_or_champion() -> None:
    moves = [moved("canary", None, "3", 300), moved("champion", "1", "2", 200), moved("candidate", "3", "4", 10)]
    assert find_canary_analysis(state_of(moves=moves, canary="3", champion="2"), SETTINGS) == CanaryAnalysis(
        "3", "2", NOW - 200, NOW + 800
    )
    unrecorded = state_of(moves=moves, canary="4", champion="2")
    assert find_canary_analysis(unrecorded, SETTINGS) is None
    assert action(unrecorded).kind == "wait"
    assert find_canary_analysis(state_of(moves=moves, canary="3"), SETTINGS) is None
    assert find_canary_analysis(state_of(moves=moves, champion="2"), SETTINGS) is None


def watch_of(moves: Sequence[AliasMoved], champion: str, previous: str, *quarantined: str) -> PostPromotionWatch | None:
    return find_watch(state_of(moves=moves, quarantined=quarantined, champion=champion, previous=previous), SETTINGS)


def test_a_promotion_is_watched_and_a_rollback_is_not() -> None:
    promoted = [moved("champion", None, "2", 500), moved("champion", "2", "3"), moved("previous", None, "2")]
    found = watch_of(promoted, "3", "2")
    assert found == WATCH
    assert found.sides == ((ServingPeriod("3", NOW - 100),), (ServingPeriod("2", NOW - 100),))
    assert find_watch(state_of(moves=promoted, champion="3"), SETTINGS) is None
    assert watch_of(promoted, "3", "2", "2") is None
    assert watch_of(promoted, "4", "2") is None, "the last move is not recorded"
    assert watch_of(promoted, "3", "1") is None, "the last move is not recorded"
    assert watch_of([*promoted, moved("champion", "3", "2", 50)], "2", "2") is None


def test_versions_promoted_during_a_watch_join_it_until_it_ends() -> None:
    moves = [moved("champion", None, "1", 900), moved("champion", "1", "2", 90), moved("previous", None, "1", 90)]
    moves += [moved("champion", "2", "3", 50), moved("champion", "3", "4", 10)]
    promoted = (ServingPeriod("2", NOW - 90), ServingPeriod("3", NOW - 50), ServingPeriod("4", NOW - 10))
    assert watch_of(moves, "4", "1") == PostPromotionWatch(promoted, "1", NOW + 510)
    ended = [*moves, moved("previous", "1", "4", 8)]
    assert watch_of(ended, "4", "4") is None
    again = [*ended, moved("champion", "4", "5", 5)]
    assert watch_of(again, "5", "4") == PostPromotionWatch((ServingPeriod("5", NOW - 5),), "4", NOW + 595)
    after_rollback = [*again, moved("champion", "5", "4", 3), moved("champion", "4", "6", 1)]
    assert watch_of(after_rollback, "6", "4") == PostPromotionWatch((ServingPeriod("6", NOW - 1),), "4", NOW + 599)


def test_two_promotions_that_were_recorded_as_one_move_are_watched_with_the_version_that_is_known() -> None:
    moves = [moved("previous", None, "2", 500), moved("champion", "1", "3", 90)]
    assert watch_of(moves, "3", "2") == PostPromotionWatch((ServingPeriod("3", NOW - 90),), "2", NOW + 510)
    from_anchor = [moved("previous", None, "2", 500), moved("champion", "2", "3", 90)]
    assert watch_of([moved("champion", None, "1", 900), *from_anchor], "3", "2") == watch_of(moves, "3", "2")


def test_previous_moved_by_hand_begins_a_watch() -> None:
    moves = [moved("champion", None, "1", 900), moved("champion", "1", "2", 800), moved("previous", None, "1", 60)]
    assert watch_of(moves, "2", "1") == PostPromotionWatch((ServingPeriod("2", NOW - 60),), "1", NOW + 540)


WATCHED = state_of(PASSED, candidate="4", canary="4", champion="3", previous="2")


@pytest.mark.parametrize(
    ("compared", "expected"),
    [
        (comparison(-0.3), "rollback"),
        (comparison(-0.03), "rollback"),
        (comparison(0.0, per_second=-0.3), "rollback"),
        (replace(comparison(0.1), labels=(estimate(-0.4, label="sql"),)), "rollback"),
        (comparison(-0.3, width=0.4), "wait"),
        (comparison(-0.3, enough=False), "wait"),
        (comparison(0.0), "end_watch"),
        (comparison(0.1), "end_watch"),
    ],
)
def test_a_watch_ends_before_any_other_action(compared: Comparison, expected: str) -> None:
    found = action(WATCHED, LiveComparisons(watch=(WATCH, compared), canary=(ANALYSIS, comparison(0.0, width=0.1))))
    assert (found.kind, found.quarantine) == (expected, expected == "rollback")
    if expected != "wait":
        assert found.version == "3"
        assert found.why.startswith("1 version up to 3 against anchor 2: ")
        assert found.figures["acceptance_length_difference"] == compared.overall[1].difference


def test_an_undecided_watch_ends_after_its_duration_and_the_champion_stays() -> None:
    moves = [moved("champion", "2", "3", 600), moved("previous", "1", "2", 600)]
    at = replace(WATCHED, moves=moves)
    found = action(at)
    assert (found.kind, found.version, found.quarantine) == ("end_watch", "3", False)
    assert "promoter.watch_duration" in found.why
    younger = replace(WATCHED, moves=[replace_time(move, 599) for move in moves])
    assert action(younger).kind == "wait"
    unwatched = choose_action(at, NO_COMPARISON, NOW, Canary(share=0.1, anchor_share=0), SETTINGS)
    assert unwatched.kind == "wait"


def test_a_watch_whose_anchor_is_in_quarantine_ends() -> None:
    found = action(replace(WATCHED, quarantined=["2"]))
    assert (found.kind, found.version, found.quarantine) == ("end_watch", "3", False)


@pytest.mark.parametrize(
    ("ago", "left"),
    [([], None), ([50], 50), ([150], None), ([500, 50], 150), ([900, 500, 150], 250), ([20_000, 50], 50)],
)
def test_the_cooldown_doubles_with_each_rollback_and_forgets_old_ones(ago: list[float], left: float | None) -> None:
    until = find_cooldown_end([rollback(each) for each in ago], NOW, SETTINGS)
    assert until == (None if left is None else NOW + left)


def test_rollbacks_by_hand_and_abandoned_rollbacks_start_no_cooldown() -> None:
    assert find_cooldown_end([rollback(50, actor="ann"), rollback(50, state="abandoned")], NOW, SETTINGS) is None
