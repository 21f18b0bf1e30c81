"""A promoter that is killed before one of its writes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from pipeline.delta import DeltaLog
from schemas.settings import Settings
from trainer.release.audit import KafkaEvents
from trainer.release.promoter import Promoter
from trainer.release.registry import Line, SpeculatorRegistry


class OneLine(SpeculatorRegistry):
    """A registry that hides the lines of other tests, which every poll would handle."""

    def __init__(self, settings: Settings, line: str) -> None:
        super().__init__(settings.registry)
        self._line = line

    def lines(self) -> list[Line]:
        return [line for line in super().lines() if line.name == self._line]


def poll(settings: Settings, line: str, writes: int) -> None:
    """Poll a line once; SIGKILL ends the poll after so many writes to registry and tables."""
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

    registry.set_alias = counted(registry.set_alias)  # type: ignore[method-assign]
    registry.write_audit_state = counted(registry.write_audit_state)  # type: ignore[method-assign]
    tables.append_after = counted(tables.append_after)  # type: ignore[method-assign]
    Promoter(settings, registry, tables, KafkaEvents(settings.kafka)).poll()
