"""Start, restart, give up and stop of parts, with fake processes and a fake clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from ops.local.parts import Part
from ops.local.process import Process
from ops.local.supervisor import MAX_QUICK_DEATHS, QUICK_DEATH_S, PartFailedError, State, Supervisor, restart_delay


@dataclass
class FakeProcess:
    """Stand-in for a process."""

    name: str
    events: list[str]
    alive: bool = False
    exit_code: int | None = None
    starts: int = 0
    log: Path = field(default_factory=lambda: Path("logs/x.log"))

    def start(self) -> None:
        self.alive, self.exit_code = True, None
        self.starts += 1
        self.events.append(f"start {self.name}")

    def stop(self, grace_s: float = 0) -> None:
        if self.alive:
            self.events.append(f"stop {self.name}")
        self.alive = False

    def die(self, code: int = -9) -> None:
        self.alive, self.exit_code = False, code


@dataclass
class World:
    """A stack of fake processes."""

    now: float = 0.0
    events: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    ready: set[str] = field(default_factory=set)
    result: dict[str, FakeProcess] = field(default_factory=dict)

    def part(self, name: str, *after: str) -> Part:
        self.result[name] = FakeProcess(name, self.events)
        return Part(name, cast(Process, self.result[name]), self.answers(name), after, timeout_s=60)

    def answers(self, name: str) -> Callable[[], bool]:
        return lambda: name in self.ready

    def supervisor(self, *parts: Part, restart: bool = True) -> Supervisor:
        return Supervisor(parts, self.said.append, restart=restart, clock=lambda: self.now)

    def pass_time(self, supervisor: Supervisor, seconds: float) -> None:
        self.now += seconds
        supervisor.tick()


@pytest.fixture
def world() -> World:
    return World()


def test_a_part_starts_when_its_dependencies_are_ready(world: World) -> None:
    supervisor = world.supervisor(world.part("broker"), world.part("stream", "broker"))
    supervisor.tick()
    assert world.events == ["start broker"]
    world.ready.add("broker")
    supervisor.tick()
    supervisor.tick()
    assert world.events == ["start broker", "start stream"]
    assert not supervisor.ready
    world.ready.add("stream")
    supervisor.tick()
    assert supervisor.ready


def test_parts_stop_in_reverse_order(world: World) -> None:
    supervisor = world.supervisor(world.part("broker"), world.part("stream"), world.part("serve"))
    supervisor.tick()
    world.events.clear()
    supervisor.stop()
    assert world.events == ["stop serve", "stop stream", "stop broker"]


def test_a_stopped_part_stays_stopped_until_the_next_start(world: World) -> None:
    world.ready |= {"serve", "train"}
    supervisor = world.supervisor(world.part("serve"), world.part("train"), restart=False)
    supervisor.start(poll_s=0)
    supervisor.stop(["train"])
    world.pass_time(supervisor, 60)
    assert [supervisor.parts[name].state for name in ("serve", "train")] == [State.READY, State.STOPPED]
    assert world.result["train"].starts == 1
    supervisor.start(poll_s=0)
    assert world.result["train"].starts == 2
    assert supervisor.ready


def test_a_dead_part_restarts_after_a_delay_and_its_log_is_named(world: World) -> None:
    world.ready.add("stream")
    supervisor = world.supervisor(world.part("stream"))
    supervisor.tick()
    supervisor.tick()
    world.result["stream"].die()
    supervisor.tick()
    assert world.result["stream"].starts == 1
    assert "died with code -9; read logs/x.log" in world.said[-1]
    world.pass_time(supervisor, 1)
    world.pass_time(supervisor, 1)
    assert world.result["stream"].starts == 2
    assert supervisor.ready
    assert supervisor.parts["stream"].restarts == 1


def test_a_part_that_keeps_dying_is_given_up_and_the_others_continue(world: World) -> None:
    world.ready.add("serve")
    supervisor = world.supervisor(world.part("serve"), world.part("train"))
    supervisor.tick()
    for _ in range(MAX_QUICK_DEATHS + 3):
        world.result["train"].die(1)
        supervisor.tick()
        world.pass_time(supervisor, 60)
    assert supervisor.parts["train"].state is State.GAVE_UP
    assert world.result["train"].starts == MAX_QUICK_DEATHS + 1
    assert "is not restarted" in world.said[-1]
    assert supervisor.parts["serve"].state is State.READY


def test_a_long_run_resets_the_death_count(world: World) -> None:
    world.ready.add("train")
    supervisor = world.supervisor(world.part("train"))
    for _ in range(MAX_QUICK_DEATHS * 3):
        supervisor.tick()
        supervisor.tick()
        world.pass_time(supervisor, QUICK_DEATH_S + 1)
        world.result["train"].die()
        supervisor.tick()
        world.pass_time(supervisor, 1)
    assert supervisor.parts["train"].state is not State.GAVE_UP


def test_a_part_that_never_becomes_ready_counts_as_dead(world: World) -> None:
    supervisor = world.supervisor(world.part("registry"))
    supervisor.tick()
    world.pass_time(supervisor, 61)
    assert supervisor.parts["registry"].state is State.DOWN
    assert world.events == ["start registry", "stop registry"]


def test_without_restart_a_death_is_an_error_that_names_the_log(world: World) -> None:
    world.ready.add("serve")
    supervisor = world.supervisor(world.part("serve"), restart=False)
    supervisor.tick()
    supervisor.tick()
    world.result["serve"].die(1)
    with pytest.raises(PartFailedError, match=r"serve died with code 1; read logs/x\.log"):
        supervisor.tick()


def test_start_fails_when_a_part_is_given_up(world: World) -> None:
    part = world.part("stream")
    supervisor = world.supervisor(part)
    supervisor.parts["stream"].state = State.GAVE_UP
    with pytest.raises(PartFailedError, match="stream does not start"):
        supervisor.start(poll_s=0)


def test_restart_delays_grow_to_a_maximum_and_then_end() -> None:
    pauses = [restart_delay(deaths) for deaths in range(1, MAX_QUICK_DEATHS + 2)]
    assert pauses[-1] is None
    known = [pause for pause in pauses if pause is not None]
    assert known == sorted(known)
    assert known[0] < known[-1] <= 10
