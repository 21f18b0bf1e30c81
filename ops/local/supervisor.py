"""Start the parts of the stack in order, restart parts that die, and stop them in reverse order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ops.local.parts import Part
from schemas.errors import UserError

QUICK_DEATH_S = 30.0
"""A part that dies within this time after its start has not recovered from its previous death."""
MAX_QUICK_DEATHS = 4
_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 10.0
_STOP_GRACE_S = 30.0


class State(StrEnum):
    """State of a part."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    GAVE_UP = "gave up"
    STOPPED = "stopped"
    """Stopped by the caller, until the next ``start``."""


class PartFailedError(UserError):
    """A part died or did not start; the message names its log."""


@dataclass
class SupervisedPart:
    """Part with its state and its deaths."""

    part: Part
    state: State = State.WAITING
    started: float = 0.0
    restart_at: float = 0.0
    quick_deaths: int = 0
    restarts: int = 0


def restart_delay(quick_deaths: int) -> float | None:
    """Return seconds until the next start after consecutive quick deaths; None to give up."""
    if quick_deaths > MAX_QUICK_DEATHS:
        return None
    return min(_FIRST_DELAY_S * 2.0 ** max(quick_deaths - 1, 0), _MAX_DELAY_S)


class Supervisor:
    """Advance the parts at each ``tick`` of the caller's loop.

    Not thread-safe: call it from one thread that lives as long as the program, because the kernel ends the parts with
    that thread.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        say: Callable[[str], None],
        *,
        restart: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Treat every death as an error if ``restart`` is false, even that of a ready part."""
        self.parts = {part.name: SupervisedPart(part) for part in parts}
        self._say = say
        self._restart = restart
        self._clock = clock

    @property
    def ready(self) -> bool:
        """True if every part is ready."""
        return all(w.state is State.READY for w in self.parts.values())

    def tick(self) -> None:
        """Start parts whose dependencies are ready, and check running parts.

        Raises:
            PartFailedError: with ``restart=False``, a part died or was not ready in time.
            StartError: the preparation of a part failed.
        """
        for supervised in self.parts.values():
            match supervised.state:
                case State.WAITING if self._may_start(supervised.part):
                    self._start(supervised)
                case State.DOWN if self._clock() >= supervised.restart_at:
                    supervised.restarts += 1
                    self._start(supervised)
                case State.STARTING | State.READY:
                    self._check(supervised)

    def start(self, poll_s: float = 0.2) -> None:
        """Tick until every part is ready, also those that ``stop`` has stopped.

        Raises:
            PartFailedError: a part died too often.
            StartError: the preparation of a part failed.
        """
        for supervised in self.parts.values():
            if supervised.state is State.STOPPED:
                supervised.state = State.WAITING
        while not self.ready:
            self.tick()
            for name, supervised in self.parts.items():
                if supervised.state is State.GAVE_UP:
                    raise PartFailedError(f"{name} does not start; read {supervised.part.process.log}")
            time.sleep(poll_s)

    def stop(self, names: Sequence[str] | None = None) -> None:
        """Stop the named parts or all, in reverse order; ``tick`` does not start them again."""
        for name, supervised in reversed(self.parts.items()):
            if names is None or name in names:
                supervised.part.process.stop(_STOP_GRACE_S)
                supervised.state = State.GAVE_UP if supervised.state is State.GAVE_UP else State.STOPPED

    def _may_start(self, part: Part) -> bool:
        return all(self.parts[name].state is State.READY for name in part.after)

    def _start(self, supervised: SupervisedPart) -> None:
        if supervised.part.prepare:
            supervised.part.prepare()
        supervised.part.process.start()
        supervised.started = self._clock()
        supervised.state = State.STARTING

    def _check(self, supervised: SupervisedPart) -> None:
        process, age = supervised.part.process, self._clock() - supervised.started
        if not process.alive:
            self._handle_death(supervised, f"died with code {process.exit_code}", age)
        elif supervised.state is State.STARTING and supervised.part.ready():
            supervised.state = State.READY
            self._say(f"{supervised.part.name} is ready after {age:.0f} s")
        elif supervised.state is State.STARTING and age > supervised.part.timeout_s:
            self._handle_death(supervised, f"was not ready after {age:.0f} s", age)

    def _handle_death(self, supervised: SupervisedPart, event: str, age: float) -> None:
        process = supervised.part.process
        process.stop()  # it may still run after a readiness timeout
        message = f"{supervised.part.name} {event}; read {process.log}"
        if not self._restart:
            supervised.state = State.GAVE_UP
            raise PartFailedError(message)
        recovered = supervised.state is State.READY and age > QUICK_DEATH_S
        supervised.quick_deaths = 1 if recovered else supervised.quick_deaths + 1
        pause = restart_delay(supervised.quick_deaths)
        if pause is None:
            supervised.state = State.GAVE_UP
            self._say(f"{message}; it died {supervised.quick_deaths} times in a row and is not restarted")
            return
        supervised.state = State.DOWN
        supervised.restart_at = self._clock() + pause
        self._say(f"{message}; restarting it in {pause:.1f} s")
