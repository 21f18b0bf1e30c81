"""The promoter records every move in table and topic, also after crashes and outages."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from promoter_world import LINE, World, figures

from schemas.settings import Kafka, SettingsError
from trainer.release.audit import KafkaEvents
from trainer.release.registry import Line, RegistryError


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


FIRST = [("candidate", None, "1", "trainer"), ("champion", None, "1", "promoter")]
SECOND = [("candidate", "1", "2", "trainer"), ("champion", "1", "2", "promoter"), ("previous", None, "1", "promoter")]
"""Rows of one move are in the order of the aliases, not in the order of the changes."""


def test_every_move_of_a_promotion_has_a_row_and_an_event(world: World) -> None:
    world.promoter.poll()
    assert world.promoter.status().champion is None
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.promoter.poll()
    world.promoter.poll()
    assert world.rows() == FIRST
    world.registry.register("2", figures(0.5, "1", 0.3))
    world.promoter.poll()
    assert world.registry.named == {"candidate": "2", "champion": "2", "previous": "1"}
    assert world.rows() == FIRST + SECOND
    assert world.topic.kept[f"{LINE}/champion"].to_version == "2"
    assert world.topic.kept[f"{LINE}/champion"].figures["accepted_per_step"] == 0.5
    status = world.promoter.status()
    assert (status.champion, status.candidate, status.previous, status.alias_moves, status.error) == (
        "2",
        "2",
        "1",
        5,
        None,
    )
    figures_of_row = json.loads(world.tables.read_in_order("promotions").to_pylist()[3]["figures"])
    gain = {"gain_low": 0.2, "gain_high": 0.2, "prompts": 20}
    expected = {"accepted_per_step": 0.5, "champion_accepted_per_step": 0.3, "samples": 20, **gain}
    assert figures_of_row == pytest.approx(expected)


def test_a_candidate_compared_with_an_earlier_champion_waits_for_the_next(world: World) -> None:
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.promoter.poll()
    world.registry.register("2", figures(0.5, "day-0-head-0", 0.0))
    world.promoter.poll()
    assert world.registry.named["champion"] == "1"
    assert "waiting" in (world.promoter.status().verdict or "")
    world.registry.register("3", figures(0.6, "1", 0.3))
    world.promoter.poll()
    assert world.registry.named["champion"] == "3"


class CrashError(BaseException):
    """The process crashes."""


@pytest.mark.parametrize("at", ["previous", "champion"])
def test_the_next_start_finishes_a_move_after_a_crash(world: World, at: str) -> None:
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.promoter.poll()
    world.registry.register("2", figures(0.5, "1", 0.3))

    def crash(alias: str) -> None:
        if alias == at:
            raise CrashError

    world.registry.breaks = crash
    with pytest.raises(CrashError):
        world.promoter.poll()
    world.registry.breaks = lambda _: None
    world.restart().poll()
    assert world.registry.named == {"candidate": "2", "champion": "2", "previous": "1"}
    alias_moves = [row[:3] for row in world.rows()]
    assert sorted(alias_moves, key=str) == sorted([row[:3] for row in FIRST + SECOND], key=str)


@pytest.mark.parametrize("rows_written", [0, 1, 2])
def test_the_next_start_writes_rows_lost_in_a_crash(world: World, rows_written: int) -> None:
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.promoter.poll()
    world.registry.register("2", figures(0.5, "1", 0.3))
    append, written = world.tables.append_after, []

    def crash(name: str, version: int, rows: pa.Table) -> bool:
        if name == "promotions":
            # The row of the candidate is written before the decision; the crash comes at one of the rows after it.
            if len(written) == rows_written:
                raise CrashError
            written.append(rows)
        return append(name, version, rows)

    world.tables.append_after = crash  # type: ignore[method-assign]
    with pytest.raises(CrashError):
        world.promoter.poll()
    world.tables.append_after = append  # type: ignore[method-assign]
    world.restart().poll()
    world.promoter.poll()
    assert world.rows() == FIRST + SECOND
    assert world.topic.kept[f"{LINE}/previous"].to_version == "1"


def test_nothing_is_promoted_while_moves_cannot_be_recorded(world: World) -> None:
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.tables.down = True
    world.promoter.poll()
    assert "champion" not in world.registry.named
    assert "tables" in (world.promoter.status().error or "")
    world.tables.down = False
    world.promoter.poll()
    assert world.rows() == FIRST
    assert world.promoter.status().error is None


def test_unsent_events_survive_a_restart(world: World) -> None:
    world.topic.down = True
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.promoter.poll()
    assert world.registry.named["champion"] == "1"
    assert "broker" in (world.promoter.status().error or "")
    world.restart().poll()
    world.topic.down = False
    world.promoter.poll()
    assert {key.split("/")[1] for key in world.topic.kept} == {"candidate", "champion"}


def test_an_unreachable_registry_is_polled_again(world: World) -> None:
    lines = world.registry.lines

    def unreachable() -> list[Line]:
        raise RegistryError("registry.tracking_uri: no answer")

    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.registry.lines = unreachable  # type: ignore[method-assign]
    world.promoter.poll()
    assert "registry.tracking_uri" in (world.promoter.status().error or "")
    world.registry.lines = lines  # type: ignore[method-assign]
    world.promoter.poll()
    assert world.rows() == FIRST


def test_a_rollback_by_hand_is_recorded_with_an_unknown_actor(world: World) -> None:
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.promoter.poll()
    world.registry.register("2", figures(0.5, "1", 0.3))
    world.promoter.poll()
    world.registry.named["champion"] = "1"
    world.promoter.poll()
    assert world.registry.named["champion"] == "1"
    assert world.rows()[-1] == ("champion", "2", "1", "unknown")


def test_an_unknown_kafka_option_names_the_setting() -> None:
    with pytest.raises(SettingsError, match=r"kafka\.client_options"):
        KafkaEvents(Kafka(client_options={"no.such.option": "1"}))
