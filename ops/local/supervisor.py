"""Starts the parts of the stack in order, starts them again when they die, and stops them in reverse."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ops.local.parts import Part
from schemas.errors import UserError

QUICK_S = 30.0
"""A part that dies within this time of its start has not recovered from its last death."""
GIVE_UP_AFTER = 4
_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 10.0
_STOP_GRACE_S = 30.0


class State(StrEnum):
    """Where a part is."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    GAVE_UP = "gave up"


class PartFailedError(UserError):
    """A part that died or did not start; the message names its log."""


@dataclass
class Watched:
    """A part and how it has fared."""

    part: Part
    state: State = State.WAITING
    started: float = 0.0
    again_at: float = 0.0
    quick_deaths: int = 0
    restarts: int = 0


def delay(quick_deaths: int) -> float | None:
    """Seconds until the next start after so many quick deaths in a row; None to give up."""
    if quick_deaths > GIVE_UP_AFTER:
        return None
    return min(_FIRST_DELAY_S * 2.0 ** max(quick_deaths - 1, 0), _LONGEST_DELAY_S)


class Supervisor:
    """Drives the parts from ``tick`` to ``tick``; the caller's loop sets the pace.

    Not thread-safe, and to be driven from one thread that lives as long as the program: the kernel ties the parts'
    lives to it.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        say: Callable[[str], None],
        *,
        restart: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``restart=False`` makes any death an error, also that of a part which was ready."""
        self.watched = {part.name: Watched(part) for part in parts}
        self._say = say
        self._restart = restart
        self._clock = clock

    @property
    def ready(self) -> bool:
        """True when every part is."""
        return all(w.state is State.READY for w in self.watched.values())

    def tick(self) -> None:
        """Start what may start, and look after what runs.

        Raises:
            PartFailedError: with ``restart=False``, a part died or was not ready in time.
            StartError: a part could not be prepared for its start.
        """
        for watched in self.watched.values():
            match watched.state:
                case State.WAITING if self._may_start(watched.part):
                    self._start(watched)
                case State.DOWN if self._clock() >= watched.again_at:
                    watched.restarts += 1
                    self._start(watched)
                case State.STARTING | State.READY:
                    self._look_after(watched)

    def start(self, poll_s: float = 0.2) -> None:
        """Tick until every part is ready.

        Raises:
            PartFailedError: a part gave up.
            StartError: a part could not be prepared for its start.
        """
        while not self.ready:
            self.tick()
            for name, watched in self.watched.items():
                if watched.state is State.GAVE_UP:
                    raise PartFailedError(f"{name} does not start; read {watched.part.process.log}")
            time.sleep(poll_s)

    def stop(self, names: Sequence[str] | None = None) -> None:
        """Stop the named parts, or all, the last one first."""
        for name, watched in reversed(self.watched.items()):
            if names is None or name in names:
                watched.part.process.stop(_STOP_GRACE_S)
                watched.state = State.GAVE_UP if watched.state is State.GAVE_UP else State.WAITING

    def _may_start(self, part: Part) -> bool:
        return all(self.watched[name].state is State.READY for name in part.after)

    def _start(self, watched: Watched) -> None:
        if watched.part.prepare:
            watched.part.prepare()
        watched.part.process.start()
        watched.started = self._clock()
        watched.state = State.STARTING

    def _look_after(self, watched: Watched) -> None:
        process, age = watched.part.process, self._clock() - watched.started
        if not process.alive:
            self._died(watched, f"died with code {process.exit_code}", age)
        elif watched.state is State.STARTING and watched.part.ready():
            watched.state = State.READY
            self._say(f"{watched.part.name} is ready after {age:.0f} s")
        elif watched.state is State.STARTING and age > watched.part.timeout_s:
            self._died(watched, f"was not ready after {age:.0f} s", age)

    def _died(self, watched: Watched, how: str, age: float) -> None:
        process = watched.part.process
        process.stop()  # it may be alive, and merely not ready in time
        told = f"{watched.part.name} {how}; read {process.log}"
        if not self._restart:
            watched.state = State.GAVE_UP
            raise PartFailedError(told)
        recovered = watched.state is State.READY and age > QUICK_S
        watched.quick_deaths = 1 if recovered else watched.quick_deaths + 1
        pause = delay(watched.quick_deaths)
        if pause is None:
            watched.state = State.GAVE_UP
            self._say(f"{told}; it died {watched.quick_deaths} times in a row and is left alone")
            return
        watched.state = State.DOWN
        watched.again_at = self._clock() + pause
        self._say(f"{told}; starting it again in {pause:.1f} s")
