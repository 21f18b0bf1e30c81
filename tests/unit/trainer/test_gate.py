"""The gate passes better candidates only, and the promoter records every move in spite of crashes and outages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pytest
from promoter_world import LINE, World, figures

from schemas.settings import Kafka, SettingsError
from schemas.settings import Promoter as PromoterSettings
from trainer.release.audit import KafkaEvents
from trainer.release.gate import HELD_OUT_TAG, HeldOutComparison, LabelComparison, is_worth_registering, judge_candidate
from trainer.release.registry import Line, RegistryError


@pytest.mark.parametrize(
    ("champion", "tags", "promote", "says"),
    [
        (None, figures(0.5, "day-0-head-0", 0.1), True, "better by more than"),
        ("3", figures(0.5, "3", 0.4), True, "better by more than"),
        ("3", figures(0.5, "3", 0.5), False, "not better"),
        ("3", figures(0.45, "3", 0.41), False, "promoter.gate_margin 0.05"),
        ("3", figures(0.9, "2", 0.1), False, "champion is 3, waiting for the next candidate"),
        ("3", figures(0.9, "day-0-head-0", 0.1), False, "waiting for the next candidate"),
        (None, figures(0.9, "3", 0.1), False, "champion is day-0, waiting"),
        ("3", figures(0.9, "3", 0.1, samples=7), False, "promoter.gate_min_samples requires 8"),
        ("4", figures(0.9, "3", 0.1), False, "version 4 is champion"),
        ("3", {}, False, "tag held_out"),
        ("3", {"held_out": '{"accepted_per_step": 1}'}, False, "tag held_out"),
    ],
)
def test_the_gate_promotes_only_what_beat_the_present_champion(
    champion: str | None, tags: Mapping[str, str], promote: bool, says: str
) -> None:
    verdict = judge_candidate("4", champion, tags, PromoterSettings(gate_margin=0.05, gate_min_samples=8))
    assert verdict.promote is promote
    assert says in verdict.why


def test_without_a_candidate_nothing_is_promoted() -> None:
    assert judge_candidate(None, "1", {}, PromoterSettings()).promote is False


@pytest.mark.parametrize(
    ("labels", "lost"),
    [
        ([("sql", 0.46, 4), ("chat", 0.9, 20)], None),
        ([("sql", 0.44, 4), ("chat", 0.9, 20)], "label sql 1.440 against 1.500 on 4 samples"),
        ([("sql", 0.1, 3), ("chat", 0.9, 20)], None),
        ([("sql", 0.3, 4), ("", 0.2, 4)], "label none 1.200"),
        ([(None, 0.2, 4)], "the other labels 1.200"),
    ],
)
def test_a_candidate_that_is_better_over_all_must_not_lose_on_a_label(
    labels: list[tuple[str | None, float, int]], lost: str | None
) -> None:
    on = [
        LabelComparison(label=label, accepted_per_step=length, champion_accepted_per_step=0.5, samples=samples)
        for label, length, samples in labels
    ]
    held_out = HeldOutComparison(
        accepted_per_step=0.8, champion="3", champion_accepted_per_step=0.5, samples=24, labels=tuple(on)
    )
    tags = {HELD_OUT_TAG: held_out.model_dump_json()}
    verdict = judge_candidate("4", "3", tags, PromoterSettings(gate_label_margin=0.05, gate_label_min_samples=4))
    assert verdict.promote is (lost is None)
    assert (lost or "better by more than") in verdict.why


def test_figures_of_labels_are_among_those_that_are_written_down() -> None:
    on = LabelComparison(label="sql", accepted_per_step=0.4, champion_accepted_per_step=0.3, samples=4)
    held_out = HeldOutComparison(
        accepted_per_step=0.8, champion="3", champion_accepted_per_step=0.5, samples=24, labels=(on,)
    )
    assert held_out.figures["accepted_per_step/sql"] == 0.4
    assert HeldOutComparison.from_tags({HELD_OUT_TAG: held_out.model_dump_json()}) == held_out


def test_a_version_is_registered_only_if_it_beats_the_one_before() -> None:
    assert is_worth_registering(0.3, champion=0.1, last=None)
    assert not is_worth_registering(0.1, champion=0.1, last=None)
    assert is_worth_registering(0.3, champion=0.1, last=0.2)
    assert not is_worth_registering(0.2, champion=0.1, last=0.2)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


FIRST = [("candidate", None, "1", "trainer"), ("champion", None, "1", "promoter")]
SECOND = [("candidate", "1", "2", "trainer"), ("champion", "1", "2", "promoter"), ("previous", None, "1", "promoter")]
"""Rows of one move are in the order of the aliases, whatever the order in which they were made."""


def test_a_better_candidate_becomes_champion_and_every_move_has_a_row_and_an_event(world: World) -> None:
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
    assert figures_of_row == {"accepted_per_step": 0.5, "champion_accepted_per_step": 0.3, "samples": 20}


def test_a_candidate_measured_against_an_older_champion_waits_for_the_next(world: World) -> None:
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
    """The process ends here."""


@pytest.mark.parametrize("at", ["previous", "champion"])
def test_a_crash_before_an_alias_move_is_repaired_by_the_next_start(world: World, at: str) -> None:
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
def test_rows_lost_in_a_crash_after_the_move_are_written_by_the_next_start(world: World, rows_written: int) -> None:
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.promoter.poll()
    world.registry.register("2", figures(0.5, "1", 0.3))
    append, written = world.tables.append_after, []

    def crash(name: str, version: int, rows: pa.Table) -> bool:
        if name == "promotions":
            # The candidate's own row comes before the decision; the crash is among those after it.
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


def test_nothing_is_promoted_while_the_move_before_cannot_be_written_down(world: World) -> None:
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.tables.down = True
    world.promoter.poll()
    assert "champion" not in world.registry.named
    assert "tables" in (world.promoter.status().error or "")
    world.tables.down = False
    world.promoter.poll()
    assert world.rows() == FIRST
    assert world.promoter.status().error is None


def test_events_wait_for_the_broker_and_outlive_a_restart(world: World) -> None:
    world.topic.down = True
    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.promoter.poll()
    assert world.registry.named["champion"] == "1"
    assert "broker" in (world.promoter.status().error or "")
    world.restart().poll()
    world.topic.down = False
    world.promoter.poll()
    assert {key.split("/")[1] for key in world.topic.kept} == {"candidate", "champion"}


def test_a_registry_that_is_away_is_asked_again(world: World) -> None:
    lines = world.registry.lines

    def away() -> list[Line]:
        raise RegistryError("registry.tracking_uri: no answer")

    world.registry.register("1", figures(0.3, "day-0-head-0", 0.0))
    world.registry.lines = away  # type: ignore[method-assign]
    world.promoter.poll()
    assert "registry.tracking_uri" in (world.promoter.status().error or "")
    world.registry.lines = lines  # type: ignore[method-assign]
    world.promoter.poll()
    assert world.rows() == FIRST


def test_a_rollback_by_hand_is_written_down_as_such(world: World) -> None:
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
