"""The promoter on live traffic, with real tables: what becomes of good and bad versions, and what is written of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from live_traffic import Answered, rows_of
from promoter_world import LINE, World, figures
from structlog.testing import capture_logs

from schemas.events import QUARANTINED_TAG

SLICE = 10.0
FLAGS = {
    "canary.share": 0.25,
    "canary.slice_duration": SLICE,
    "promoter.canary_min_requests": 40,
    "promoter.watch_min_requests": 40,
    "promoter.watch_duration": 600,
    "promoter.cooldown": 60,
}


@pytest.fixture
def world(tmp_path: Path) -> World:
    """With a champion, and a candidate that passed the gate."""
    world = World(tmp_path, **FLAGS)
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.promoter.poll()
    world.registry.register("2", figures(0.5, "1", 0.3))
    return world


def serve(world: World, kept: Mapping[str, int], slices: int = 48, since: float | None = None, **more: str) -> None:
    """Two nodes that serve the versions in turn, a slice each, from the next slice on."""
    first = ((since or time.time()) // SLICE + 1) * SLICE
    world.tables.append(
        "traces",
        rows_of(
            Answered(
                version,
                first + number * SLICE,
                kept=kept[version],
                verify_steps=10 + number % 3 + place,
                verify_step_s=0.01 + 0.001 * (number % 2),
                node=node,
                label=more.get("label"),
            )
            for number in range(slices)
            for place, node in enumerate("ab")
            for version in [list(kept)[(number + place) % len(kept)]]
            for _ in range(3)
        ),
    )


def tried(world: World) -> None:
    world.promoter.poll()
    assert world.registry.named == {"candidate": "2", "champion": "1", "canary": "2"}


def test_a_canary_that_does_as_well_becomes_champion(world: World) -> None:
    tried(world)
    serve(world, {"1": 1, "2": 1})
    world.promoter.poll()
    assert world.registry.named == {"candidate": "2", "champion": "2", "previous": "1"}
    assert [row[:3] for row in world.rows()][-3:] == [
        ("canary", "2", None),
        ("champion", "1", "2"),
        ("previous", None, "1"),
    ]
    assert world.topic.kept[f"{LINE}/champion"].figures["requests"] == 144


def test_a_bad_canary_is_taken_back_quarantined_told_and_never_tried_again(world: World) -> None:
    tried(world)
    serve(world, {"1": 2, "2": 0}, slices=16)
    world.promoter.poll()
    (trial,) = world.promoter.status().comparisons
    assert (trial.kind, trial.version, trial.baseline, trial.requests) == ("canary", "2", "1", 48)
    assert world.registry.named["canary"] == "2", "sixteen slices are too few"
    serve(world, {"1": 2, "2": 0}, since=time.time() + 20 * SLICE)
    with capture_logs() as logs:
        world.promoter.poll()
    assert world.registry.named == {"candidate": "2", "champion": "1"}
    assert world.rows()[-1] == ("canary", "2", None, "promoter")
    assert "worse" in world.registry.registered["2"][QUARANTINED_TAG]
    (alert,) = [line for line in logs if line["event"] == "taken_back"]
    assert (alert["log_level"], alert["alias"], alert["version"]) == ("warning", "canary", "2")
    assert world.promoter.metrics.get_sample_value("aurora_promoter_taken_back_total", {"alias": "canary"}) == 1
    assert world.promoter.status().last_rollback == alert["why"]
    moved = world.topic.kept[f"{LINE}/canary"]
    assert moved.figures["tokens_per_verify_step_difference"] < -0.6
    world.restarted().poll()
    assert "canary" not in world.registry.named
    assert "quarantine" in (world.promoter.status().verdict or "")
    assert world.promoter.status().last_rollback == alert["why"]


def test_a_promoter_that_starts_again_decides_as_the_one_before_would_have(world: World) -> None:
    tried(world)
    serve(world, {"1": 1, "2": 1}, slices=12)
    world.promoter.poll()
    before = world.promoter.status()
    world.restarted().poll()
    after = world.promoter.status()
    assert before.comparisons == after.comparisons
    assert before.verdict == after.verdict
    serve(world, {"1": 1, "2": 1}, since=time.time() + 20 * SLICE)
    world.restarted().poll()
    assert world.registry.named["champion"] == "2"


def test_a_trial_without_traffic_ends_and_the_version_is_not_put_into_quarantine(world: World) -> None:
    tried(world)
    world.ahead = 86_400
    world.promoter.poll()
    assert "canary" not in world.registry.named
    assert QUARANTINED_TAG not in world.registry.registered["2"]
    world.promoter.poll()
    assert "canary" not in world.registry.named
    assert "had its trial" in (world.promoter.status().verdict or "")


@pytest.fixture
def promoted(tmp_path: Path) -> World:
    """Version 2 became champion without a trial, after version 1 had served for a while."""
    world = World(tmp_path, **{**FLAGS, "canary.share": 0.0})
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.promoter.poll()
    serve(world, {"1": 2}, since=time.time() - 500)
    world.registry.register("2", figures(0.5, "1", 0.3))
    world.promoter.poll()
    assert world.registry.named == {"candidate": "2", "champion": "2", "previous": "1"}
    return world


def test_a_champion_that_falls_is_taken_back_and_nothing_is_promoted_for_a_while(promoted: World) -> None:
    world = promoted
    serve(world, {"2": 0})
    with capture_logs() as logs:
        world.promoter.poll()
    assert (world.registry.named["champion"], world.registry.named.get("previous")) == ("1", None)
    assert ("champion", "2", "1", "promoter") in world.rows()
    assert QUARANTINED_TAG in world.registry.registered["2"]
    assert [line["alias"] for line in logs if line["event"] == "taken_back"] == ["champion"]
    world.registry.register("3", figures(0.6, "1", 0.3))
    world.promoter.poll()
    status = world.promoter.status()
    assert status.champion == "1"
    assert "nothing is promoted before" in (status.verdict or "")
    assert status.cooldown_until is not None
    assert status.cooldown_until == pytest.approx(time.time() + 60, abs=20)
    world.ahead = 61
    world.restarted().poll()
    assert world.registry.named["champion"] == "3"


def test_traffic_that_changed_takes_no_champion_back(promoted: World) -> None:
    serve(promoted, {"2": 0}, label="new")
    promoted.promoter.poll()
    assert promoted.registry.named["champion"] == "2"
    assert promoted.promoter.status().comparisons[0].requests == 0


def test_a_champion_that_does_as_well_stays(promoted: World) -> None:
    serve(promoted, {"2": 2})
    promoted.promoter.poll()
    (watch,) = promoted.promoter.status().comparisons
    assert (watch.kind, watch.requests, watch.baseline_requests) == ("watch", 288, 288)
    assert promoted.registry.named["champion"] == "2"
    promoted.ahead = 601
    promoted.promoter.poll()
    assert promoted.promoter.status().comparisons == []


class CrashError(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("writes", [0, 1, 2, 3])
def test_a_rollback_that_a_crash_cut_short_is_made_by_the_next_start(
    promoted: World, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the quarantine, the intent, the move of an alias, and the end of the intent."""
    world, left = promoted, [writes]
    serve(world, {"2": 0})

    def crash(*_: object) -> None:
        if left[0] == 0:
            raise CrashError
        left[0] -= 1

    quarantine, append = world.registry.quarantine, world.tables.append_after
    world.registry.breaks = crash
    monkeypatch.setattr(world.registry, "quarantine", lambda *at: crash() or quarantine(*at))
    monkeypatch.setattr(world.tables, "append_after", lambda *at: crash() or append(*at))
    with pytest.raises(CrashError):
        world.promoter.poll()
    left[0] = 1000
    world.restarted().poll()
    assert world.registry.named == {"candidate": "2", "champion": "1"}
    assert QUARANTINED_TAG in world.registry.registered["2"]
    assert [row for row in world.rows() if row[0] == "champion"][-1] == ("champion", "2", "1", "promoter")
    world.promoter.poll()
    assert world.registry.named == {"candidate": "2", "champion": "1"}
