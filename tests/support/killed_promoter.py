"""A promoter that is killed before one of its writes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from pipeline.delta import DeltaLog
from schemas.settings import Settings
from trainer.release.alias_moves import Mover
from trainer.release.audit import Audit, KafkaEvents
from trainer.release.live_figures import LiveFigures
from trainer.release.promoter import Promoter
from trainer.release.registry import Line, SpeculatorRegistry


class OneLine(SpeculatorRegistry):
    """A registry without what other tests have left in it, which every pass would look at."""

    def __init__(self, settings: Settings, line: str) -> None:
        super().__init__(settings.registry)
        self._line = line

    def lines(self) -> list[Line]:
        return [line for line in super().lines() if line.name == self._line]


def poll(settings: Settings, line: str, writes: int) -> None:
    """One pass over a line that ends with SIGKILL after so many writes to registry and tables."""
    tables, registry = DeltaLog(settings.tables), OneLine(settings, line)
    left = writes

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return method(*arguments)

        return call

    registry.point = counted(registry.point)  # type: ignore[method-assign]
    registry.stamp = counted(registry.stamp)  # type: ignore[method-assign]
    tables.append_after = counted(tables.append_after)  # type: ignore[method-assign]
    audit, live = Audit(tables, KafkaEvents(settings.kafka)), LiveFigures(tables, settings.canary.slice_duration)
    Promoter(settings, registry, audit, Mover(tables, registry), live).poll()
