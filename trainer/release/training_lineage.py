"""Which requests taught what is in training since the last version, and the spans that say so of a new one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from schemas.telemetry.spans import LINKS, Span, Value
from schemas.telemetry.trace_context import TraceContext, of_request, of_version

MOST = 65_536
"""Requests that are remembered; of a version that learned from more, the first are named and the others counted."""


class Lessons:
    """Requests by the step that learned from them first. Kept in memory: a restarted trainer names those after it."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._steps: dict[str, int] = {}
        self._since = clock()
        self.left_out = 0
        """Steps' requests that were not remembered."""

    def learned(self, step: int, requests: Iterable[str]) -> None:
        """Take down whom a step learned from."""
        for request in requests:
            if len(self._steps) < MOST:
                self._steps.setdefault(request, step)
            elif request not in self._steps:
                self.left_out += 1

    def went_back(self, step: int) -> None:
        """Forget what was learned after a step: the weights have, too."""
        self._steps = {request: learned for request, learned in self._steps.items() if learned <= step}

    def registered(self, line: str, version: str, step: int) -> Iterator[Span]:
        """The spans of a new version, the first of which the others are parts of; then all begins anew."""
        context, start, end = of_version(line, version), self._since, self._clock()
        taught: dict[str, Value] = {"line": line, "version": version, "step": step}
        whole: dict[str, Value] = {**taught, "requests": len(self._steps), "left_out": self.left_out}
        yield Span(name="register", context=context, start=start, end=end, attributes=whole)
        # A request may have several choices, which share its trace.
        for links in _runs(dict.fromkeys(map(of_request, self._steps))):
            yield Span("learn", context.child(), start, end, context.span, links=links, attributes=taught)
        self._steps, self._since, self.left_out = {}, end, 0


def _runs(contexts: Iterable[TraceContext]) -> Iterator[tuple[TraceContext, ...]]:
    left = iter(contexts)
    while run := tuple(islice(left, LINKS)):
        yield run
