"""What ``aurora up`` shows while it runs."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ops.local.stack import Stack
from ops.local.supervisor import State
from ops.observe.status import Gatherer, Overview

_COLOURS = {State.READY: "green", State.GAVE_UP: "red", State.DOWN: "yellow"}
_EVERY_S = 2.0


class StatusLine:
    """One line at the bottom of the terminal that follows the stack; nothing but events where there is no terminal."""

    def __init__(self) -> None:
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._gatherer: Gatherer | None = None
        self._overview = Overview()
        self._asked = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._gatherer:
            self._gatherer.close()

    def say(self, text: str) -> None:
        """Print a line above."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, stack: Stack) -> None:
        """Bring the line up to date; asks the processes every two seconds."""
        if not self._console.is_terminal:
            return
        self._gatherer = self._gatherer or Gatherer(stack.settings)
        if time.monotonic() - self._asked > _EVERY_S:
            self._overview = self._gatherer.gather()
            self._asked = time.monotonic()
        line = Text()
        for name, watched in stack.supervisor.watched.items():
            line.append(f"{name} {watched.state}  ", style=_COLOURS.get(watched.state, "dim"))
        line.append(summary(self._overview))
        self._live.update(line, refresh=True)


def summary(overview: Overview) -> str:
    """The figures that matter most, on one line."""
    told = []
    if serve := overview.serve:
        told.append(f"serving {serve.speculator or 'without speculation'}, {serve.requests_finished:,} answered")
    if overview.trace_lag is not None:
        told.append(f"{overview.trace_lag:,} records behind")
    if train := overview.train:
        told.append(f"step {train.step:,}")
    return " · ".join(told)
