"""Looking after a stack that runs, and taking samples of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ops.demo.record import Sample
from ops.local.stack import Stack
from ops.observe.status import Gatherer, Overview

_TICK_S = 0.25
_SAMPLE_EVERY_S = 1.0
_RATE_OVER_S = 10.0


@dataclass
class Watch:
    """The newest look at a stack, and the samples of all looks."""

    stack: Stack
    looked: Callable[[], None]
    """Called after every look."""
    overview: Overview = field(default_factory=Overview)
    samples: list[Sample] = field(default_factory=list)
    _sampled: float = 0.0
    _gatherer: Gatherer = field(init=False)

    def __post_init__(self) -> None:
        self._gatherer = Gatherer(self.stack.settings)

    def until(self, done: Callable[[], bool], limit_s: float) -> bool:
        """Look after the stack, once a second also at it, until ``done`` or the time is over; whether it was done.

        Raises what ``Stack.tick`` raises.
        """
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            self.stack.tick()
            if time.monotonic() - self._sampled >= _SAMPLE_EVERY_S:
                self.look()
                if done():
                    return True
            time.sleep(_TICK_S)
        return False

    def look(self) -> None:
        """Take a sample now."""
        self._sampled = time.monotonic()
        seen = self._gatherer.gather()
        # A process too busy to answer in time keeps its last figures.
        self.overview = seen.model_copy(
            update={name: getattr(self.overview, name) for name in seen.silent if name != "tables"}
        )
        if serve := self.overview.serve:
            train = self.overview.train
            self.samples.append(
                Sample(
                    time=time.time(),
                    output_tokens=serve.output_tokens,
                    trace_lag=self.overview.trace_lag,
                    step=train.step if train else 0,
                    loss=train.loss if train else None,
                )
            )
        self.looked()

    def close(self) -> None:
        """Give the connections back."""
        self._gatherer.close()


def newest_rate(samples: list[Sample]) -> float | None:
    """Output tokens per second over the last ten seconds."""
    if len(samples) < 2:
        return None
    recent = [sample for sample in samples if sample.time >= samples[-1].time - _RATE_OVER_S]
    first, last = recent[0], recent[-1]
    return (last.output_tokens - first.output_tokens) / (last.time - first.time) if last.time > first.time else None
