"""What the promoter does next, from what is written down and seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from schemas.events import Alias, AliasIntent, AliasMoved
from schemas.settings import Promoter
from trainer.release.gate import Verdict
from trainer.release.promotion import (
    Seen,
    Step,
    Trial,
    Watch,
    Written,
    cooling_until,
    fallen,
    next_step,
    trial_of,
    watch_of,
)
from trainer.release.sequential_test import Estimate, Standing

NOW = 1_000_000.0
SETTINGS = Promoter(canary_timeout=1000, watch_duration=600, cooldown=100, cooldown_window=10_000, watch_min_ratio=0.8)
PASSED, FAILED = Verdict(promote=True, why="better"), Verdict(promote=False, why="not better")
TRIAL = Trial("3", "2", NOW - 100, NOW + 900)
WATCH = Watch("3", "2", NOW - 100, NOW + 500)


def moved(alias: Alias, before: str | None, after: str | None, ago: float = 100) -> AliasMoved:
    time = datetime.fromtimestamp(NOW - ago, UTC)
    return AliasMoved(
        time=time, line="l", alias=alias, from_version=before, to_version=after, actor="promoter", why="", figures={}
    )


def written(
    gate: Verdict = FAILED,
    moves: Sequence[AliasMoved] = (),
    quarantined: Sequence[str] = (),
    rollbacks: Sequence[float] = (),
    **aliases: str,
) -> Written:
    return Written(aliases, moves, [rollback(ago) for ago in rollbacks], quarantined, gate)


def rollback(ago: float, actor: str = "promoter", state: str = "done") -> tuple[AliasIntent, str]:
    time = datetime.fromtimestamp(NOW - ago, UTC)
    wanted = AliasIntent(id="i", time=time, line="l", action="rollback", changes=(), actor=actor, why="", figures={})
    return wanted, state


def estimate(difference: float, width: float = 0.01, **named: object) -> Estimate:
    """Of tokens per verify step over all labels, with as much evidence as the interval says."""
    plain = Estimate(
        "tokens per verify step",
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


def standing(
    per_verify_step: float, per_second: float | None = None, width: float = 0.01, *, enough: bool = True
) -> Standing:
    overall = estimate(per_verify_step, width)
    seconds = estimate(per_verify_step if per_second is None else per_second, width, figure="tokens per second")
    return Standing(500, 500, enough=enough, overall=(seconds, overall))


def step(at: Written, seen: Seen = Seen(), share: float = 0.1, settings: Promoter = SETTINGS) -> Step:  # noqa: B008 - it is frozen
    return next_step(at, seen, NOW, share, settings)


CANDIDATE = {"candidate": "3", "champion": "2"}


@pytest.mark.parametrize(
    ("at", "share", "what"),
    [
        (written(PASSED, **CANDIDATE), 0.1, "start_canary"),
        (written(PASSED, **CANDIDATE), 0.0, "promote"),
        (written(PASSED, candidate="3"), 0.1, "promote"),
        (written(FAILED, **CANDIDATE), 0.1, "wait"),
        (written(PASSED, [moved("canary", None, "3")], **CANDIDATE), 0.1, "wait"),
        (written(PASSED, [moved("canary", None, "3")], **CANDIDATE), 0.0, "promote"),
        (written(PASSED, [moved("champion", None, "3")], **CANDIDATE), 0.1, "wait"),
        (written(PASSED, rollbacks=[50], **CANDIDATE), 0.1, "wait"),
        (written(PASSED, rollbacks=[150], **CANDIDATE), 0.1, "start_canary"),
        (written(PASSED, canary="1", **CANDIDATE), 0.0, "promote"),
    ],
)
def test_a_candidate_that_passed_the_gate_is_tried_or_promoted_once(at: Written, share: float, what: str) -> None:
    found = step(at, share=share)
    assert found.what == what
    assert found.version == (None if what == "wait" else "3")
    assert not found.quarantine


@pytest.mark.parametrize(
    ("stand", "what", "quarantine"),
    [
        (standing(0.0), "promote", False),
        (standing(0.0, width=0.1), "wait", False),
        (standing(-0.2), "end_canary", True),
        (standing(0.0, enough=False), "wait", False),
        (standing(0.0, per_second=-0.2), "end_canary", True),
    ],
)
def test_a_canary_is_promoted_taken_back_or_waited_for(stand: Standing, what: str, quarantine: bool) -> None:
    found = step(written(canary="3", **CANDIDATE), Seen(trial=(TRIAL, stand)))
    assert (found.what, found.quarantine) == (what, quarantine)
    if what != "wait":
        assert found.figures["tokens_per_verify_step_difference"] == stand.overall[1].difference


def test_a_trial_that_comes_to_no_end_is_ended_as_the_settings_say() -> None:
    at = written(canary="3", **CANDIDATE)
    over = replace(TRIAL, until=NOW)
    undecided, below = standing(-0.04, width=0.1), standing(-0.06, width=0.1)
    ended = step(at, Seen(trial=(over, undecided)))
    assert (ended.what, ended.version, ended.quarantine) == ("end_canary", "3", False)
    by_estimate = SETTINGS.model_copy(update={"canary_on_timeout": "estimate"})
    assert step(at, Seen(trial=(over, undecided)), settings=by_estimate).what == "promote"
    assert step(at, Seen(trial=(over, below)), settings=by_estimate).what == "end_canary"
    too_few = standing(0.1, width=0.5, enough=False)
    assert step(at, Seen(trial=(over, too_few)), settings=by_estimate).what == "end_canary"


def test_a_canary_that_won_waits_while_promotions_cooldown() -> None:
    at = written(canary="3", rollbacks=[50], **CANDIDATE)
    found = step(at, Seen(trial=(TRIAL, standing(0.0))))
    assert found.what == "wait"
    assert "cooldown" in found.why


def test_a_canary_in_quarantine_or_without_a_champion_beside_it_is_ended() -> None:
    assert step(written(canary="3", quarantined=["3"], **CANDIDATE), Seen(trial=(TRIAL, standing(0.0)))).what == (
        "end_canary"
    )
    assert step(written(canary="3", champion="3")).what == "end_canary"


def test_a_trial_runs_since_canary_and_champion_are_what_they_are() -> None:
    moves = [moved("canary", None, "3", 300), moved("champion", "1", "2", 200), moved("candidate", "3", "4", 10)]
    assert trial_of(written(moves=moves, canary="3", champion="2"), SETTINGS) == Trial("3", "2", NOW - 200, NOW + 800)
    unrecorded = written(moves=moves, canary="4", champion="2")
    assert trial_of(unrecorded, SETTINGS) is None
    assert step(unrecorded).what == "wait"
    assert trial_of(written(moves=moves, canary="3"), SETTINGS) is None
    assert trial_of(written(moves=moves, champion="2"), SETTINGS) is None


def test_a_promotion_is_watched_and_a_rollback_is_not() -> None:
    promoted = [moved("champion", "2", "3")]
    found = watch_of(written(moves=promoted, champion="3", previous="2"), NOW, SETTINGS)
    assert found == Watch("3", "2", NOW - 100, NOW + 500)
    assert [span.since for span in found.spans] == [NOW - 100, NOW - 700]
    assert watch_of(written(moves=promoted, champion="3"), NOW, SETTINGS) is None
    assert watch_of(written(moves=promoted, champion="3", previous="2"), NOW + 500, SETTINGS) is None
    back = [*promoted, moved("champion", "3", "2", 50)]
    assert watch_of(written(moves=back, quarantined=["3"], champion="2", previous="3"), NOW, SETTINGS) is None
    assert watch_of(written(moves=back, champion="2", previous="1"), NOW, SETTINGS) is None


def test_a_champion_that_fell_is_taken_back_into_quarantine_before_anything_else_is_looked_at() -> None:
    at = written(PASSED, candidate="4", canary="4", champion="3", previous="2")
    found = step(at, Seen(watch=(WATCH, standing(-0.5)), trial=(TRIAL, standing(0.1))))
    assert (found.what, found.version, found.quarantine) == ("rollback", "3", True)
    assert "watch_min_ratio" in found.why


@pytest.mark.parametrize(
    ("stand", "falls"),
    [
        (standing(-0.3), True),
        (standing(-0.195), False),
        (standing(-0.3, width=0.15), False),
        (standing(-0.3, enough=False), False),
        (standing(0.0, per_second=-0.5), False),
        (standing(-0.05, per_second=-0.5), True),
    ],
)
def test_only_a_certain_fall_counts_and_slower_verify_steps_alone_are_load(stand: Standing, falls: bool) -> None:
    assert (fallen(stand, SETTINGS) is not None) is falls


def test_a_fall_on_one_label_counts() -> None:
    on_sql = (estimate(-0.4, label="sql", figure="tokens per second"), estimate(-0.4, label="sql"))
    found = fallen(replace(standing(0.1), labels=on_sql), SETTINGS)
    assert found is not None
    assert found.label == "sql"


@pytest.mark.parametrize(
    ("ago", "left"),
    [([], None), ([50], 50), ([150], None), ([500, 50], 150), ([900, 500, 150], 250), ([20_000, 50], 50)],
)
def test_the_cooldown_doubles_with_each_rollback_and_forgets_old_ones(ago: list[float], left: float | None) -> None:
    until = cooling_until([rollback(each) for each in ago], NOW, SETTINGS)
    assert until == (None if left is None else NOW + left)


def test_rollbacks_by_hand_and_those_that_were_not_made_cool_nothing_down() -> None:
    assert cooling_until([rollback(50, actor="ann"), rollback(50, state="abandoned")], NOW, SETTINGS) is None
