"""The promoter on live traffic, with real tables: it promotes good versions, rolls bad ones back, and records both."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from live_traffic import ServedRequest, rows_of
from promoter_world import LINE, World, figures
from structlog.testing import capture_logs

from schemas.events import QUARANTINED_TAG

SLICE = 10.0
FLAGS = {
    "canary.share": 0.25,
    "canary.slice_duration": SLICE,
    "canary.burn_in": 0,
    "promoter.canary_min_requests": 40,
    "promoter.watch_min_requests": 40,
    "promoter.watch_duration": 600,
    "promoter.cooldown": 60,
}


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A line with a champion, and a candidate that passed the gate."""
    world = World(tmp_path, **FLAGS)
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.promoter.poll()
    world.registry.register("2", figures(0.5, "1", 0.3))
    return world


def serve(world: World, accepted: Mapping[str, int], slices: int = 48, since: float | None = None, **more: str) -> None:
    """Two nodes that serve the versions in turn, a slice each, from the next slice on."""
    first = ((since or time.time()) // SLICE + 1) * SLICE
    world.tables.append(
        "traces",
        rows_of(
            ServedRequest(
                version,
                first + number * SLICE,
                accepted=accepted[version],
                verify_steps=10 + number % 3 + place,
                verify_step_s=0.01 + 0.001 * (number % 2),
                node=node,
                label=more.get("label"),
            )
            for number in range(slices)
            for place, node in enumerate("ab")
            for version in [list(accepted)[(number + place) % len(accepted)]]
            for _ in range(3)
        ),
    )


def start_canary(world: World) -> None:
    world.promoter.poll()
    assert world.registry.named == {"candidate": "2", "champion": "1", "canary": "2"}


def test_an_equal_canary_becomes_champion(world: World) -> None:
    start_canary(world)
    serve(world, {"1": 1, "2": 1})
    world.promoter.poll()
    assert world.registry.named == {"candidate": "2", "champion": "2", "previous": "1"}
    assert [row[:3] for row in world.rows()][-3:] == [
        ("canary", "2", None),
        ("champion", "1", "2"),
        ("previous", None, "1"),
    ]
    assert world.topic.kept[f"{LINE}/champion"].figures["requests"] == 144


def test_a_bad_canary_is_rolled_back_quarantined_and_never_becomes_canary_again(world: World) -> None:
    start_canary(world)
    serve(world, {"1": 2, "2": 0}, slices=16)
    world.promoter.poll()
    (canary,) = world.promoter.status().comparisons
    assert (canary.kind, canary.version, canary.baseline, canary.requests) == ("canary", "2", "1", 48)
    labels = {"line": LINE, "kind": "canary", "figure": "acceptance length"}
    difference = world.promoter.metrics.get_sample_value("aurora_promoter_canary_difference_ratio", labels)
    assert difference is not None
    assert difference < -0.6
    assert world.registry.named["canary"] == "2", "sixteen slices are too few"
    serve(world, {"1": 2, "2": 0}, since=time.time() + 20 * SLICE)
    with capture_logs() as logs:
        world.promoter.poll()
    assert world.registry.named == {"candidate": "2", "champion": "1"}
    assert world.rows()[-1] == ("canary", "2", None, "promoter")
    assert "worse" in world.registry.registered["2"][QUARANTINED_TAG]
    (alert,) = [line for line in logs if line["event"] == "version_rolled_back"]
    assert (alert["log_level"], alert["alias"], alert["version"]) == ("warning", "canary", "2")
    assert world.promoter.metrics.get_sample_value("aurora_promoter_rollbacks_total", {"alias": "canary"}) == 1
    assert world.promoter.status().last_rollback == alert["why"]
    moved = world.topic.kept[f"{LINE}/canary"]
    assert moved.figures["acceptance_length_difference"] < -0.6
    world.restart().poll()
    assert "canary" not in world.registry.named
    assert "quarantine" in (world.promoter.status().verdict or "")
    assert world.promoter.status().last_rollback == alert["why"]


def test_a_restarted_promoter_makes_the_same_decisions(world: World) -> None:
    start_canary(world)
    serve(world, {"1": 1, "2": 1}, slices=12)
    world.promoter.poll()
    before = world.promoter.status()
    world.restart().poll()
    after = world.promoter.status()
    assert before.comparisons == after.comparisons
    assert before.verdict == after.verdict
    serve(world, {"1": 1, "2": 1}, since=time.time() + 20 * SLICE)
    world.restart().poll()
    assert world.registry.named["champion"] == "2"


def test_a_canary_analysis_without_traffic_ends_without_quarantine(world: World) -> None:
    start_canary(world)
    world.clock_offset = 86_400
    world.promoter.poll()
    assert "canary" not in world.registry.named
    assert QUARANTINED_TAG not in world.registry.registered["2"]
    world.promoter.poll()
    assert "canary" not in world.registry.named
    assert "had its canary analysis" in (world.promoter.status().verdict or "")


@pytest.fixture
def promoted(tmp_path: Path) -> World:
    """Version 2 became champion without a canary analysis, after version 1 had served for a while."""
    world = World(tmp_path, **{**FLAGS, "canary.share": 0.0})
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.promoter.poll()
    serve(world, {"1": 2}, since=time.time() - 500)
    world.registry.register("2", figures(0.5, "1", 0.3))
    world.promoter.poll()
    assert world.registry.named == {"candidate": "2", "champion": "2", "previous": "1"}
    return world


def test_a_dropped_champion_is_rolled_back_and_starts_a_cooldown(promoted: World) -> None:
    world = promoted
    serve(world, {"2": 0})
    with capture_logs() as logs:
        world.promoter.poll()
    assert (world.registry.named["champion"], world.registry.named.get("previous")) == ("1", None)
    assert ("champion", "2", "1", "promoter") in world.rows()
    assert QUARANTINED_TAG in world.registry.registered["2"]
    assert [line["alias"] for line in logs if line["event"] == "version_rolled_back"] == ["champion"]
    world.registry.register("3", figures(0.6, "1", 0.3))
    world.promoter.poll()
    status = world.promoter.status()
    assert status.champion == "1"
    assert "nothing is promoted before" in (status.verdict or "")
    assert status.cooldown_until is not None
    assert status.cooldown_until == pytest.approx(time.time() + 60, abs=20)
    exported = world.promoter.metrics.get_sample_value(
        "aurora_promoter_cooldown_until_timestamp_seconds", {"line": LINE}
    )
    assert exported == status.cooldown_until
    world.clock_offset = 61
    world.restart().poll()
    assert world.registry.named["champion"] == "3"


def test_changed_traffic_rolls_no_champion_back(promoted: World) -> None:
    serve(promoted, {"2": 0}, label="new")
    promoted.promoter.poll()
    assert promoted.registry.named["champion"] == "2"
    assert promoted.promoter.status().comparisons[0].requests == 0


def test_an_equal_champion_stays(promoted: World) -> None:
    serve(promoted, {"2": 2})
    promoted.promoter.poll()
    (watch,) = promoted.promoter.status().comparisons
    assert (watch.kind, watch.requests, watch.baseline_requests) == ("watch", 288, 288)
    assert promoted.registry.named["champion"] == "2"
    promoted.clock_offset = 601
    promoted.promoter.poll()
    assert promoted.promoter.status().comparisons == []


class CrashError(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("writes", [0, 1, 2, 3])
def test_the_next_start_finishes_a_rollback_after_a_crash(
    promoted: World, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crashes come before the quarantine, the intent, the alias move, and the closing of the intent."""
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
    world.restart().poll()
    assert world.registry.named == {"candidate": "2", "champion": "1"}
    assert QUARANTINED_TAG in world.registry.registered["2"]
    assert [row for row in world.rows() if row[0] == "champion"][-1] == ("champion", "2", "1", "promoter")
    world.promoter.poll()
    assert world.registry.named == {"candidate": "2", "champion": "1"}
