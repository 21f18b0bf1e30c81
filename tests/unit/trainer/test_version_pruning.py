"""The promoter deletes what ``promoter.keep_versions`` does not keep, and promotes whatever that raises."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from live_traffic import ServedRequest, rows_of
from promoter_world import World, figures
from structlog.testing import capture_logs

from trainer.release.version_retention import INTERVAL_S, MAX_DELETED


def world_of(folder: Path, versions: int, **flags: object) -> World:
    """Return a line whose newest version is candidate; each has the one before as its parent."""
    world = World(folder, **{"canary.anchor_share": 0, **flags})
    world.tables.create()
    for number in range(1, versions + 1):
        gain = figures(0.1 + number / 100, "day-0-head-0", 0.1)
        world.registry.register(str(number), gain | {"parent": str(number - 1)})
    return world


def kept(world: World) -> list[int]:
    return sorted(map(int, world.registry.registered))


def counted(world: World, name: str, **labels: str) -> float | None:
    return world.promoter.metrics.get_sample_value(f"aurora_promoter_{name}_total", labels)


def test_the_promoter_deletes_all_but_the_newest_versions_and_what_needs_them(tmp_path: Path) -> None:
    world = world_of(tmp_path, 9, **{"promoter.keep_versions": 2})
    world.registry.named |= {"champion": "6"}
    world.tables.append("traces", rows_of([ServedRequest("3", time.time() - 60, accepted=1)]))
    with capture_logs() as logs:
        world.promoter.poll()
    assert kept(world) == [2, 3, 5, 6, 7, 8, 9]
    assert counted(world, "versions_pruned") == 2
    assert [one["version"] for one in logs if one["event"] == "version_pruned"] == ["1", "4"]


def test_a_served_version_is_kept_for_its_time(tmp_path: Path) -> None:
    world = world_of(tmp_path, 5, **{"promoter.keep_versions": 1, "promoter.keep_served": 3600})
    world.tables.append("traces", rows_of([ServedRequest("1", time.time() - 60, accepted=1)]))
    world.promoter.poll()
    assert kept(world) == [1, 4, 5]
    world.clock_offset = 7200
    world.promoter.poll()
    assert kept(world) == [4, 5]


def test_zero_keeps_all_and_the_default_keeps_a_hundred(tmp_path: Path) -> None:
    world = world_of(tmp_path, 105, **{"promoter.keep_versions": 0})
    world.promoter.poll()
    assert len(kept(world)) == 105
    assert counted(world, "versions_pruned") == 0
    world.settings = world_of(tmp_path / "default", 1).settings
    world.restart().poll()
    assert kept(world) == list(range(5, 106))


def test_a_poll_deletes_a_few_versions_and_a_later_one_the_next(tmp_path: Path) -> None:
    world = world_of(tmp_path, MAX_DELETED + 10, **{"promoter.keep_versions": 2})
    world.promoter.poll()
    world.promoter.poll()
    assert len(kept(world)) == 10
    world.clock_offset = INTERVAL_S + 1
    world.promoter.poll()
    assert len(kept(world)) == 3


@pytest.mark.parametrize("error", [NotImplementedError("this store deletes nothing"), OSError("connection reset")])
def test_a_failed_deletion_is_counted_and_does_not_stop_promotion(tmp_path: Path, error: Exception) -> None:
    world = world_of(tmp_path, 6, **{"promoter.keep_versions": 2})

    def fail(version: str) -> None:
        if version != "1":
            raise error

    world.registry.deletes = fail
    world.promoter.poll()
    assert world.registry.named["champion"] == "6"
    assert kept(world) == [2, 3, 4, 5, 6]
    assert (counted(world, "versions_pruned"), counted(world, "errors", part="pruning")) == (1, 1)
    assert f"pruning: {error}" in (world.promoter.status().error or "")
    world.registry.register("7", figures(0.9, "6", 0.16) | {"parent": "6"})
    world.promoter.poll()
    assert world.registry.named["champion"] == "7"
    assert counted(world, "errors", part="pruning") == 1
    world.registry.deletes = lambda _: None
    world.clock_offset = INTERVAL_S + 1
    world.promoter.poll()
    assert kept(world) == [5, 6, 7]
    assert world.promoter.status().error is None
