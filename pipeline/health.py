"""Liveness and readiness of a stream worker: the progress of its partitions, and the timers that end a stuck process.

A worker is *live* while it makes progress or has none to make. That includes a worker without partitions, one whose
broker is unreachable, and one whose store is slow or fails. A worker that is not live for ``STALL_TIMEOUT_S`` ends
itself, and its supervisor restarts it. A worker is *ready* if nothing keeps the next record from the tables.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import structlog

from pipeline.offsets import SourcePartition
from schemas.status import PartitionStatus

log = structlog.get_logger()

TICK_S = 1.0
PROGRESS_TIMEOUT_S = 15.0
"""A worker is not live if records wait and none arrives for so long, or if the watch loop does not run for so long."""
JOIN_TIMEOUT_S = 90.0
"""The same for the group's assignment, which may wait for other workers (``consumer.REBALANCE_TIMEOUT_S``)."""
WRITE_TIMEOUT_S = 900.0
"""The same for one attempt to read or write the tables: longer than the timeouts and retries of the store."""
STALL_TIMEOUT_S = 60.0
"""A worker that is not live for so long ends itself."""
SHUTDOWN_TIMEOUT_S = 8.0
"""Time for calls that still run when everything else has ended. Supervisors commonly wait 15 s."""


@dataclass(slots=True)
class _PartitionProgress:
    next_offset: int | None = None
    log_end: int = 0
    out_of_range: bool = False
    """True if the next offset lies outside the log: it has to be compared with the tables again."""
    last_progress: float = 0.0
    last_seek: float = 0.0


class ProgressTracker:
    """Tracks how far the assigned partitions have been read, and since when a partition is stalled.

    Use it on one event loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._partitions: dict[SourcePartition, _PartitionProgress] = {}
        self._buffered: Counter[SourcePartition] = Counter()

    def assign(self, sources: Iterable[SourcePartition]) -> None:
        """Start again with these partitions. Records in the buffer stay counted."""
        self._partitions = {source: _PartitionProgress(last_progress=self._clock()) for source in sources}

    def add_buffered(self, source: SourcePartition) -> None:
        """Count a record of the partition that was read into the buffer."""
        self._buffered[source] += 1

    def remove_buffered(self, source: SourcePartition) -> None:
        """Count a buffered record as written, skipped or deferred."""
        self._buffered[source] -= 1
        self._reset_stall(source)

    def set_next_offset(self, source: SourcePartition, offset: int) -> None:
        """Set the next offset of the tables."""
        if source in self._partitions:
            self._partitions[source].next_offset = offset

    def set_log_range(self, source: SourcePartition, start: int, end: int) -> None:
        """Set the range of offsets on the broker: records from ``start`` up to, but not including, ``end``."""
        if source in self._partitions:
            p = self._partitions[source]
            p.log_end, p.out_of_range = end, p.next_offset is not None and not start <= p.next_offset <= end

    def reset_stalls(self) -> None:
        """Restart the stall timers: no record could arrive, because reading was blocked or the broker unreachable."""
        for source in self._partitions:
            self._reset_stall(source)

    def stalled_s(self, source: SourcePartition) -> float:
        """Return for how long records of a partition have waited on the broker while none was in the buffer."""
        partition = self._partitions[source]
        if self._buffered[source] or partition.next_offset is None or partition.next_offset >= partition.log_end:
            self._reset_stall(source)
        return self._clock() - partition.last_progress

    def record_seek(self, source: SourcePartition) -> None:
        """Record that the consumer was sent to the next offset."""
        if source in self._partitions:
            self._partitions[source].last_seek = self._clock()

    def stalled(self, after_s: float) -> list[SourcePartition]:
        """Return the partitions that are stalled for more than ``after_s``, also since the last seek."""
        now = self._clock()
        return [s for s, p in self._partitions.items() if min(self.stalled_s(s), now - p.last_seek) > after_s]

    def unverified(self) -> list[SourcePartition]:
        """Return the partitions whose next offset is unknown or lies outside the log."""
        return [s for s, p in self._partitions.items() if p.next_offset is None or p.out_of_range]

    def without_offset(self) -> list[SourcePartition]:
        """Return the partitions whose next offset was not read from the tables yet."""
        return [source for source, partition in self._partitions.items() if partition.next_offset is None]

    def sources(self) -> list[SourcePartition]:
        """Return the assigned partitions."""
        return sorted(self._partitions)

    def statuses(self) -> list[PartitionStatus]:
        """Return the status of every partition whose next offset is known."""
        return [
            PartitionStatus(
                partition=source.partition,
                next_offset=partition.next_offset,
                end_offset=max(partition.log_end, partition.next_offset),
                lag=max(partition.log_end - partition.next_offset, 0),
                stalled_s=round(self.stalled_s(source), 1),
            )
            for source, partition in sorted(self._partitions.items())
            if partition.next_offset is not None
        ]

    def _reset_stall(self, source: SourcePartition) -> None:
        if source in self._partitions:
            self._partitions[source].last_progress = self._clock()


@dataclass(frozen=True, slots=True)
class HealthSnapshot:
    """Durations, in seconds, of the conditions that decide liveness and readiness; 0 for one that does not hold."""

    unwatched_s: float
    """Since the last iteration of the watch loop."""
    joining_s: float
    """The broker answers, and the group has not assigned partitions."""
    writing_s: float
    """Duration of the current attempt to read or write the tables."""
    stalled_s: Mapping[int, float]
    """By partition: records wait on the broker and none arrived."""
    without_offset: tuple[int, ...]
    """Partitions whose next offset was not read from the tables yet."""
    error: str | None
    """Last error of the broker or the tables, if it persists."""


def liveness_problems(health: HealthSnapshot) -> list[str]:
    """Return the reasons why the worker is not live; empty if it is."""
    problems = []
    if health.unwatched_s > PROGRESS_TIMEOUT_S + TICK_S:
        problems.append(f"the watch loop has not run for {health.unwatched_s:.0f} s")
    if health.joining_s > JOIN_TIMEOUT_S:
        problems.append(f"the group has not assigned partitions for {health.joining_s:.0f} s")
    if health.writing_s > WRITE_TIMEOUT_S:
        problems.append(f"the tables have not answered for {health.writing_s:.0f} s (tables.uri)")
    problems += [
        f"partition {partition}: records wait and none has arrived for {seconds:.0f} s"
        for partition, seconds in sorted(health.stalled_s.items())
        if seconds > PROGRESS_TIMEOUT_S
    ]
    return problems


def readiness_problems(health: HealthSnapshot) -> list[str]:
    """Return the reasons why the next record would not reach the tables; empty if it would."""
    problems = liveness_problems(health)
    if health.joining_s > 0:
        problems.append("the group has not assigned partitions yet")
    if health.without_offset:
        problems.append(f"the tables have not returned the next offset of partitions {list(health.without_offset)}")
    if health.error:
        problems.append(health.error)
    return problems


class Watchdog(threading.Thread):
    """Ends the process if the worker is not live for too long. A thread, because the event loop itself may hang."""

    def __init__(self, last_live: Callable[[], float]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._last_live = last_live

    def run(self) -> None:
        """Wait until the worker stalls, then end the process."""
        while time.monotonic() - self._last_live() < STALL_TIMEOUT_S:
            time.sleep(TICK_S)
        log.critical(
            "worker_stalled", seconds=STALL_TIMEOUT_S, why="the worker is not live; its supervisor restarts it"
        )
        # Not sys.exit: a hanging event loop would wait for itself. The tables are the truth, so nothing is lost.
        os._exit(1)


class ShutdownTimer(threading.Thread):
    """Ends a process that has finished but still waits for a client call that hangs."""

    def __init__(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
        super().__init__(name="shutdown-timer", daemon=True)
        self._timeout_s = timeout_s

    def run(self) -> None:
        """Wait, then log the stack of every thread and end the process."""
        time.sleep(self._timeout_s)
        log.warning("shutdown_forced", seconds=self._timeout_s)
        faulthandler.dump_traceback()
        # The next worker completes an interrupted commit: the tables are the truth.
        os._exit(0)
