"""The promoter on live traffic, with real tables: it promotes good versions, rolls bad ones back, and records both."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from live_traffic import ServedRequest, rows_of
from promoter_world import LINE, World, figures
from structlog.testing import capture_logs

from schemas.events import QUARANTINED_TAG
from serving.versions.alias_policy import is_anchor_slice, slice_number

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
    """Version 2 became champion without a canary analysis, and is watched against version 1."""
    world = World(tmp_path, **{**FLAGS, "canary.share": 0.0})
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.promoter.poll()
    world.registry.register("2", figures(0.5, "1", 0.3))
    world.promoter.poll()
    assert world.registry.named == {"candidate": "2", "champion": "2", "previous": "1"}
    return world


def test_a_dropped_champion_is_rolled_back_and_starts_a_cooldown(promoted: World) -> None:
    world = promoted
    serve(world, {"1": 2, "2": 0})
    with capture_logs() as logs:
        world.promoter.poll()
    assert (world.registry.named["champion"], world.registry.named["previous"]) == ("1", "1")
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


def test_traffic_that_changes_for_both_versions_rolls_no_champion_back(promoted: World) -> None:
    serve(promoted, {"1": 3, "2": 3}, slices=12)
    serve(promoted, {"1": 0, "2": 0}, slices=36, since=time.time() + 12 * SLICE)
    promoted.promoter.poll()
    assert promoted.registry.named["champion"] == "2"
    assert promoted.promoter.status().comparisons[0].requests == 144


def test_a_champion_that_is_not_worse_becomes_the_anchor(promoted: World) -> None:
    serve(promoted, {"1": 2, "2": 2})
    promoted.promoter.poll()
    (watch,) = promoted.promoter.status().comparisons
    assert (watch.kind, watch.version, watch.baseline) == ("watch", "2", "1")
    assert (watch.requests, watch.baseline_requests) == (144, 144)
    assert promoted.registry.named == {"candidate": "2", "champion": "2", "previous": "2"}
    assert promoted.rows()[-1] == ("previous", "1", "2", "promoter")
    promoted.promoter.poll()
    assert promoted.promoter.status().comparisons == []


def test_a_champion_whose_watch_stays_undecided_becomes_the_anchor(promoted: World) -> None:
    promoted.clock_offset = 590
    promoted.promoter.poll()
    assert promoted.registry.named["previous"] == "1"
    promoted.clock_offset = 610
    promoted.promoter.poll()
    assert promoted.registry.named == {"candidate": "2", "champion": "2", "previous": "2"}
    assert QUARANTINED_TAG not in promoted.registry.registered["2"]


def test_without_an_anchor_share_nothing_is_watched_and_previous_names_the_champion_before(tmp_path: Path) -> None:
    world = World(tmp_path, **{**FLAGS, "canary.share": 0.0, "canary.anchor_share": 0.0})
    for version in "123":
        champion = world.registry.named.get("champion", "day-0-head-0")
        world.registry.register(version, figures(int(version) / 10, champion, (int(version) - 1) / 10))
        world.promoter.poll()
    serve(world, {"2": 2, "3": 0})
    world.promoter.poll()
    assert world.registry.named == {"candidate": "3", "champion": "3", "previous": "2"}
    assert world.promoter.status().comparisons == []


class ShortLivedVersions:
    """Versions of 40 s each, served by four nodes with the default settings, in a time of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self._random = 1_700_000_007.0, random.Random(0)
        monkeypatch.setattr("promoter_world.time", SimpleNamespace(time=lambda: self.now))
        clock = SimpleNamespace(now=lambda zone: datetime.fromtimestamp(self.now, zone))
        monkeypatch.setattr("trainer.release.alias_moves.datetime", clock)
        monkeypatch.setattr("trainer.release.audit.datetime", clock)
        self.world = World(folder)
        self.named = self.world.registry.named

    def run(self, shares: Mapping[str, float], versions: int, *, restarts: bool = False) -> list[dict[str, str]]:
        """Return the aliases after each promotion; the last entry is after a rollback, if there was one.

        Args:
            shares: Of the draft tokens of a version that are accepted; ``others`` of those that are not named.
            versions: That are promoted, if none is rolled back.
            restarts: Whether the promoter restarts before each promotion.
        """
        states = []
        for version in map(str, range(1, 1 + versions)):
            if restarts:
                self.world.restart()
            champion = self.named.get("champion", "day-0-head-0")
            self.world.registry.register(version, figures(int(version) / 10, champion, int(version) / 10 - 0.1))
            self.world.promoter.poll()
            if self.named["champion"] == champion:
                self.world.promoter.poll()  # the poll before ended a watch
            states.append(dict(self.named))
            if self.named["champion"] != version:
                return states
            self.world.tables.append("traces", rows_of(self._serve(shares)))
            self.now += 40
        return states

    def _serve(self, shares: Mapping[str, float]) -> Iterator[ServedRequest]:
        """Yield a request every two seconds on each node."""
        champion, anchor = self.named["champion"], self.named.get("previous", self.named["champion"])
        for at in range(0, 40, 2):
            for node in "abcd":
                time = self.now + at
                version = anchor if is_anchor_slice(node, slice_number(time, 30), 0.1) else champion
                share = shares.get(version, shares["others"])
                accepted = sum(self._random.random() < share for _ in range(3))
                yield ServedRequest(version, time, accepted, 2, node=node)


def test_short_lived_versions_that_are_all_worse_are_rolled_back_to_the_anchor_by_promoters_that_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted tokens per step fall from 1.8 to 1.2."""
    fleet = ShortLivedVersions(tmp_path, monkeypatch)
    states = fleet.run({"1": 0.6, "others": 0.4}, 40, restarts=True)
    assert states[-1]["champion"] == states[-1]["previous"] == "1"
    assert len(states) < 40
    assert all(state["previous"] == "1" for state in states[1:])
    last = states[-2]["champion"]
    why = fleet.world.registry.registered[last][QUARANTINED_TAG]
    assert f"{int(last) - 1} versions up to {last} against anchor 1: worse" in why


def test_short_lived_versions_that_are_better_move_the_anchor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = ShortLivedVersions(tmp_path, monkeypatch).run({"1": 0.4, "others": 0.6}, 30)
    assert len(states) == 30
    assert states[-1]["champion"] == "30"
    assert int(states[-1]["previous"]) > 1


class CrashError(BaseException):
    """The process ends here."""


@pytest.mark.parametrize(("accepted", "writes"), [*((0, writes) for writes in range(4)), (2, 0), (2, 1), (2, 2)])
def test_the_next_start_finishes_the_end_of_a_watch_after_a_crash(
    promoted: World, accepted: int, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crashes come before the quarantine of a worse version, the intent, the alias move, and the closing of it."""
    world, left, stays = promoted, [writes], accepted > 0
    serve(world, {"1": 2, "2": accepted})

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
    for _ in range(2):
        world.restart().poll()
        champion = "2" if stays else "1"
        assert world.registry.named == {"candidate": "2", "champion": champion, "previous": champion}
        assert (QUARANTINED_TAG in world.registry.registered["2"]) is not stays
        last = ("previous", "1", "2", "promoter") if stays else ("champion", "2", "1", "promoter")
        assert world.rows()[-1] == last
