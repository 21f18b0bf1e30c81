"""Looks at a server every second, so that whoever asks how it is never waits for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import Metric

from serving.engines.sglang.node.client import Counted, Load, SglangError, SglangServer
from serving.traces.accounting import TraceCounts
from serving.traces.circuit_breaker import State

EVERY_S = 1.0
_NONE_RUN, _NOTHING = Load(0, 0), Counted(0, 0, 0, 0, 0, 0, 0, 0)


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


class Published:
    """What our plugin has published, as ``/status`` tells it of any node.

    Its metrics are the server's own, on the server's address: they are not told a second time.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    @property
    def breaker(self) -> State:
        """State of the breaker before the broker."""
        return "open" if self._watch.seen.counted.breaker_open else "closed"

    def counts(self) -> TraceCounts:
        """Where the rows are."""
        seen = self._watch.seen.counted
        pending = max(0, seen.captured - seen.published - seen.shed)
        return TraceCounts(seen.captured, seen.published, {"server": seen.shed}, pending, 0, seen.sampled_out)

    def collect(self) -> Iterator[Metric]:
        """No metrics."""
        return iter(())
