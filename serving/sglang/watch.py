"""Looks at a server every second, so that whoever asks how it is never waits for it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from serving.sglang.server import Counted, Load, SglangError, SglangServer

EVERY_S = 1.0
_NONE_RUN, _NOTHING = Load(0, 0), Counted(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Seen:
    """The last look."""

    answers: bool = False
    load: Load = _NONE_RUN
    counted: Counted = _NOTHING
    """Of the last look at which it answered."""
    error: str | None = None


class Watch:
    """What was seen of a server last, for any thread."""

    def __init__(self, server: SglangServer) -> None:
        self._server = server
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.seen = Seen()

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End it; a look that hangs is left to die with the process."""
        self._stopping.set()

    def look(self) -> None:
        """Look once."""
        try:
            self.seen = Seen(answers=True, load=self._server.load(), counted=self._server.counted())
        except SglangError as error:
            self.seen = Seen(load=self.seen.load, counted=self.seen.counted, error=str(error))

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            self.look()
