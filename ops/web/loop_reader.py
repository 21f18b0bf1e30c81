"""Reads the state of the loop for its page: statuses every few seconds, registry and tables less often.

Two threads read, so that the page answers at once and a store that hangs does not hold up the statuses. What cannot be
read keeps its last value beside the reason.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import structlog

from ops.observe.status import Overview, StatusClient
from ops.observe.top import compute_rates
from pipeline.dead_letters.queue import DeadLetter, DeadLetterFilter, DeadLetterQueue
from pipeline.delta import DeltaLog
from schemas.settings import Settings
from schemas.status import ServeStatus
from trainer.release.audit import Ledger
from trainer.release.registry import Line, SpeculatorRegistry, Version

log = structlog.get_logger()
T = TypeVar("T")

STATUS_INTERVAL_S = 5.0
STORE_INTERVAL_S = 15.0
HISTORY_S = 3600.0
"""Time that the charts span."""
_LINES = 20
"""Lines whose versions are read, those that changed last."""
_DEAD_LETTERS = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """Figures of the node over one status interval."""

    time: float
    """Unix time."""
    tokens_per_s: float
    undrafted_tokens_per_s: float | None
    """Rate that the planner expects without drafts."""
    acceptance_length: float | None
    """None without verify steps."""


@dataclass(frozen=True, slots=True)
class Reading(Generic[T]):
    """What was read last, and why the newest attempt failed."""

    value: T | None = None
    time: float | None = None
    """Unix time of ``value``."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RegisteredLine:
    """A line with its versions, oldest first."""

    line: Line
    versions: tuple[Version, ...]


@dataclass(frozen=True, slots=True)
class LoopState:
    """The whole loop at one moment."""

    overview: Overview = Overview()  # noqa: RUF009 - frozen
    samples: tuple[Sample, ...] = ()
    lines: Reading[tuple[RegisteredLine, ...]] = Reading()
    moves: Reading[Sequence[Mapping[str, Any]]] = Reading()
    """Rows of the table ``promotions``, oldest first."""
    dead_letters: Reading[Sequence[DeadLetter]] = Reading()
    """The newest, newest first."""


class LoopReader:
    """Reads while the context is open."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stopping = threading.Event()
        self._wanted = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("page-status", self._read_statuses), ("page-stores", self._read_stores))
        ]
        self._overview = Overview()
        self._samples: deque[Sample] = deque(maxlen=round(HISTORY_S / STATUS_INTERVAL_S))
        self._lines: Reading[tuple[RegisteredLine, ...]] = Reading()
        self._moves: Reading[Sequence[Mapping[str, Any]]] = Reading()
        self._dead_letters: Reading[Sequence[DeadLetter]] = Reading()

    def __enter__(self) -> Self:
        # It logs every request for a status.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._wanted.set()

    def state(self) -> LoopState:
        """Return what was read last; called from any thread."""
        return LoopState(self._overview, tuple(self._samples), self._lines, self._moves, self._dead_letters)

    def refresh(self) -> None:
        """Read registry and tables again soon."""
        self._wanted.set()

    def _read_statuses(self) -> None:
        before: tuple[float, ServeStatus] | None = None
        with closing(StatusClient(self._settings)) as client:
            while not self._stopping.is_set():
                self._overview, now = _fetch(client), time.monotonic()
                node = self._overview.serve
                if node is not None and before is not None:
                    self._add_sample(before[1], node, now - before[0])
                before = None if node is None else (now, node)
                self._stopping.wait(STATUS_INTERVAL_S)

    def _add_sample(self, before: ServeStatus, node: ServeStatus, seconds: float) -> None:
        if rates := compute_rates(before, node, seconds):
            plain = rates.tokens_per_s / node.speedup if node.speedup else None
            self._samples.append(Sample(time.time(), rates.tokens_per_s, plain, rates.acceptance_length))

    def _read_stores(self) -> None:
        tables = DeltaLog(self._settings.tables)
        registry = SpeculatorRegistry(self._settings.registry)
        ledger, letters = Ledger(tables, "promotions"), DeadLetterQueue(tables, self._settings.kafka)
        while not self._stopping.is_set():
            self._wanted.clear()
            self._lines = _read(self._lines, lambda: _read_lines(registry))
            self._moves = _read(self._moves, lambda: list(ledger.read()))
            self._dead_letters = _read(self._dead_letters, lambda: letters.find(DeadLetterFilter(limit=_DEAD_LETTERS)))
            self._wanted.wait(STORE_INTERVAL_S)


def _fetch(client: StatusClient) -> Overview:
    try:
        return client.fetch()
    except Exception as error:  # noqa: BLE001 - such as an address that is none: the page shows it
        return Overview(silent=dict.fromkeys(("serve", "stream", "train", "promoter"), str(error)))


def _read_lines(registry: SpeculatorRegistry) -> tuple[RegisteredLine, ...]:
    """Return the lines that changed last, newest first."""
    newest = registry.lines()[: -_LINES - 1 : -1]
    return tuple(RegisteredLine(line, tuple(registry.versions(line.name))) for line in newest)


def _read(before: Reading[T], read: Callable[[], T]) -> Reading[T]:
    """Return what ``read`` returns, or the value before with the error."""
    try:
        return Reading(read(), time.time())
    except Exception as error:  # noqa: BLE001 - whatever a client raises, the page shows it and the next attempt follows
        log.debug("page_part_unreadable", why=str(error))
        return Reading(before.value, before.time, str(error) or type(error).__name__)
