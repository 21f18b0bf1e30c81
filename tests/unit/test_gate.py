"""Who is promoted, what is written about it, and what a crash or an outage in between leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pipeline.table import DeltaLog, TableError
from schemas.events import Alias, AliasMoved
from schemas.settings import Kafka, Settings, SettingsError, Tables
from trainer.audit import Audit, BrokerError, KafkaEvents
from trainer.gate import HeldBack, judge, worth_registering
from trainer.promoter import Promoter
from trainer.registry import Line, RegistryError

LINE = "target-draft"


def figures(accept_length: float, champion: str, champion_accept_length: float, windows: int = 20) -> dict[str, str]:
    held_back = HeldBack(
        accept_length=accept_length, champion=champion, champion_accept_length=champion_accept_length, windows=windows
    )
    return {"held_back": held_back.model_dump_json()}


@pytest.mark.parametrize(
    ("champion", "tags", "promote", "says"),
    [
        (None, figures(0.5, "random-0", 0.1), True, "better by more than"),
        ("3", figures(0.5, "3", 0.4), True, "better by more than"),
        ("3", figures(0.5, "3", 0.5), False, "not better"),
        ("3", figures(0.45, "3", 0.41), False, "promoter.margin 0.05"),
        ("3", figures(0.9, "2", 0.1), False, "champion is 3, waiting for the next candidate"),
        ("3", figures(0.9, "random-0", 0.1), False, "waiting for the next candidate"),
        (None, figures(0.9, "3", 0.1), False, "champion is random, waiting"),
        ("3", figures(0.9, "3", 0.1, windows=7), False, "promoter.min_windows asks for 8"),
        ("4", figures(0.9, "3", 0.1), False, "version 4 is champion"),
        ("3", {}, False, "tag held_back"),
        ("3", {"held_back": '{"accept_length": 1}'}, False, "tag held_back"),
    ],
)
def test_the_gate_promotes_only_what_beat_the_present_champion(
    champion: str | None, tags: Mapping[str, str], promote: bool, says: str
) -> None:
    verdict = judge("4", champion, tags, margin=0.05, min_windows=8)
    assert verdict.promote is promote
    assert says in verdict.why


def test_without_a_candidate_nothing_is_promoted() -> None:
    assert judge(None, "1", {}, 0, 1).promote is False


def test_a_version_is_registered_only_if_it_beats_the_one_before() -> None:
    assert worth_registering(0.3, champion=0.1, candidate=None)
    assert not worth_registering(0.1, champion=0.1, candidate=None)
    assert worth_registering(0.3, champion=0.1, candidate=0.2)
    assert not worth_registering(0.2, champion=0.1, candidate=0.2)


class MemoryRegistry:
    """One line; ``breaks`` is called before each alias move."""

    def __init__(self) -> None:
        self.named: dict[str, str] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.breaks: Callable[[Alias], None] = lambda _: None

    def lines(self) -> list[Line]:
        return [Line(LINE, dict(self.named))] if self.versions else []

    def aliases(self, line: str) -> dict[str, str]:
        return dict(self.named)

    def tags(self, line: str, version: str) -> dict[str, str]:
        return self.versions[version]

    def point(self, line: str, alias: Alias, version: str) -> None:
        self.breaks(alias)
        self.named[alias] = version

    def register(self, version: str, tags: dict[str, str]) -> None:
        self.versions[version] = tags
        self.named["candidate"] = version


class MemoryTopic:
    def __init__(self) -> None:
        self.kept: dict[str, AliasMoved] = {}
        self.down = False

    def send(self, key: str, value: bytes) -> None:
        if self.down:
            raise BrokerError("kafka.bootstrap: no answer")
        self.kept[key] = AliasMoved.model_validate_json(value)


class FailingLog(DeltaLog):
    down = False

    def append(self, name: str, rows: object) -> None:
        if self.down:
            raise TableError("table promotions: gone")
        super().append(name, rows)


class World:
    def __init__(self, folder: Path) -> None:
        self.registry = MemoryRegistry()
        self.topic = MemoryTopic()
        self.tables = FailingLog(Tables(uri=str(folder)))
        self.promoter = self.restarted()

    def restarted(self) -> Promoter:
        self.promoter = Promoter(Settings(), self.registry, Audit(self.tables, self.topic))  # type: ignore[arg-type]
        return self.promoter

    def rows(self) -> list[tuple[str, str | None, str | None, str]]:
        rows = self.tables.read_in_order("promotions").to_pylist()
        return [(r["alias"], r["from_version"], r["to_version"], r["actor"]) for r in rows]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


FIRST = [("candidate", None, "1", "trainer"), ("champion", None, "1", "promoter")]
SECOND = [("candidate", "1", "2", "trainer"), ("champion", "1", "2", "promoter"), ("previous", None, "1", "promoter")]


def test_a_better_candidate_becomes_champion_and_every_move_has_a_row_and_an_event(world: World) -> None:
    world.promoter.poll()
    assert world.promoter.status().champion is None
    world.registry.register("1", figures(0.3, "random-0", 0.0))
    world.promoter.poll()
    world.promoter.poll()
    assert world.rows() == FIRST
    world.registry.register("2", figures(0.5, "1", 0.3))
    world.promoter.poll()
    assert world.registry.named == {"candidate": "2", "champion": "2", "previous": "1"}
    assert world.rows() == FIRST + SECOND
    assert world.topic.kept[f"{LINE}/champion"].to_version == "2"
    assert world.topic.kept[f"{LINE}/champion"].figures["accept_length"] == 0.5
    status = world.promoter.status()
    assert (status.champion, status.candidate, status.previous, status.moves, status.error) == ("2", "2", "1", 5, None)
    figures_of_row = json.loads(world.tables.read_in_order("promotions").to_pylist()[3]["figures"])
    assert figures_of_row == {"accept_length": 0.5, "champion_accept_length": 0.3, "windows": 20}


def test_a_candidate_measured_against_an_older_champion_waits_for_the_next(world: World) -> None:
    world.registry.register("1", figures(0.3, "random-0", 0.0))
    world.promoter.poll()
    world.registry.register("2", figures(0.5, "random-0", 0.0))
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
    world.registry.register("1", figures(0.3, "random-0", 0.0))
    world.promoter.poll()
    world.registry.register("2", figures(0.5, "1", 0.3))

    def crash(alias: str) -> None:
        if alias == at:
            raise CrashError

    world.registry.breaks = crash
    with pytest.raises(CrashError):
        world.promoter.poll()
    world.registry.breaks = lambda _: None
    world.restarted().poll()
    assert world.registry.named == {"candidate": "2", "champion": "2", "previous": "1"}
    alias_moves = [row[:3] for row in world.rows()]
    assert sorted(alias_moves, key=str) == sorted([row[:3] for row in FIRST + SECOND], key=str)


@pytest.mark.parametrize("rows_written", [0, 1, 2])
def test_rows_lost_in_a_crash_after_the_move_are_written_by_the_next_start(world: World, rows_written: int) -> None:
    world.registry.register("1", figures(0.3, "random-0", 0.0))
    world.promoter.poll()
    world.registry.register("2", figures(0.5, "1", 0.3))
    append, written = world.tables.append, []

    def crash(name: str, rows: object) -> None:
        # The candidate's own row comes before the decision; the crash is among those after it.
        if len(written) == rows_written:
            raise CrashError
        append(name, rows)
        written.append(rows)

    world.tables.append = crash  # type: ignore[method-assign]
    with pytest.raises(CrashError):
        world.promoter.poll()
    world.tables.append = append  # type: ignore[method-assign]
    world.restarted().poll()
    world.promoter.poll()
    assert world.rows() == FIRST + SECOND
    assert world.topic.kept[f"{LINE}/previous"].to_version == "1"


def test_nothing_is_promoted_while_the_move_before_cannot_be_written_down(world: World) -> None:
    world.registry.register("1", figures(0.3, "random-0", 0.0))
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
    world.registry.register("1", figures(0.3, "random-0", 0.0))
    world.promoter.poll()
    assert world.registry.named["champion"] == "1"
    assert "broker" in (world.promoter.status().error or "")
    world.restarted().poll()
    world.topic.down = False
    world.promoter.poll()
    assert {key.split("/")[1] for key in world.topic.kept} == {"candidate", "champion"}


def test_a_registry_that_is_away_is_asked_again(world: World) -> None:
    lines = world.registry.lines

    def away() -> list[Line]:
        raise RegistryError("registry.uri: no answer")

    world.registry.register("1", figures(0.3, "random-0", 0.0))
    world.registry.lines = away  # type: ignore[method-assign]
    world.promoter.poll()
    assert "registry.uri" in (world.promoter.status().error or "")
    world.registry.lines = lines  # type: ignore[method-assign]
    world.promoter.poll()
    assert world.rows() == FIRST


def test_a_rollback_by_hand_is_written_down_as_such(world: World) -> None:
    world.registry.register("1", figures(0.3, "random-0", 0.0))
    world.promoter.poll()
    world.registry.register("2", figures(0.5, "1", 0.3))
    world.promoter.poll()
    world.registry.named["champion"] = "1"
    world.promoter.poll()
    assert world.registry.named["champion"] == "1"
    assert world.rows()[-1] == ("champion", "2", "1", "unknown")


def test_an_unknown_kafka_option_names_the_setting() -> None:
    with pytest.raises(SettingsError, match=r"kafka\.client"):
        KafkaEvents(Kafka(client={"no.such.option": "1"}))
