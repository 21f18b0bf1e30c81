"""Liveness and readiness of a stream worker: the progress of its partitions, and the timers that end a stuck process.

A partition makes progress when its next offset moves. A worker is *live* while every partition makes progress or has
none to make: its log ends at the next offset, or its next record is in the buffer and waits for the tables. A worker
without partitions, or whose broker is unreachable, or whose store is slow or fails, is live, too. A worker that is not
live for ``STALL_TIMEOUT_S`` ends itself, and its supervisor restarts it. A worker is *ready* if nothing keeps the next
record from the tables.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import structlog

from pipeline.offsets import LogRange, SourcePartition
from schemas.status import PartitionStatus
from schemas.trace.record import FORMAT

log = structlog.get_logger()

TICK_S = 1.0
PROGRESS_TIMEOUT_S = 15.0
"""A worker is not live if a partition makes no progress for so long, or if the watch loop does not run for so long."""
PAUSE_RETRY_S = 30.0
"""A paused partition is read again this often: `aurora stream skip` may have moved it."""
TRANSACTION_TIMEOUT_S = 90.0
"""A worker is not ready if a transaction keeps records from it for so long. Producers' own timeout is commonly 60 s."""
JOIN_TIMEOUT_S = 90.0
"""A worker is not live if the group's assignment takes so long; it may wait for ``consumer.REBALANCE_TIMEOUT_S``."""
WRITE_TIMEOUT_S = 900.0
"""A worker is not live after so long in one attempt to read or write the tables. The store's timeouts and retries are
shorter."""
STALL_TIMEOUT_S = 60.0
"""A worker that is not live for so long ends itself."""
SHUTDOWN_TIMEOUT_S = 8.0
"""Time for calls that still run when everything else has ended. Supervisors commonly wait 15 s."""

_EMPTY_LOG = LogRange(0, 0, 0)


@dataclass(slots=True)
class _PartitionProgress:
    next_offset: int | None = None
    log: LogRange = _EMPTY_LOG
    out_of_range: bool = False
    """True if the next offset lies outside the log: it has to be compared with the tables again."""
    buffered: Counter[int] = field(default_factory=Counter)
    """Offsets of the records in the buffer."""
    times: dict[int, float] = field(default_factory=dict)
    """Unix times of the records in the buffer, by offset."""
    found: tuple[int, float] | None = None
    """An offset, and the Unix time of the first record from it on that a second consumer received."""
    last_progress: float = 0.0
    last_stable: float = 0.0
    """When the log had no open transaction, or the stable part of it grew."""
    last_seek: float = 0.0
    paused_by: str | None = None
    """The trace format of the record at the next offset, if this worker cannot read it."""


class ProgressTracker:
    """Tracks how far the assigned partitions have been read, and since when a partition is stalled.

    Use it on one event loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._partitions: dict[SourcePartition, _PartitionProgress] = {}

    def assign(self, sources: Iterable[SourcePartition]) -> None:
        """Start again with these partitions. Records in the buffer stay counted."""
        now, before = self._clock(), self._partitions
        self._partitions = {
            source: _PartitionProgress(
                last_progress=now,
                last_stable=now,
                buffered=before[source].buffered if source in before else Counter(),
                times=before[source].times if source in before else {},
            )
            for source in sources
        }

    def add_buffered(self, source: SourcePartition, offset: int, time: float) -> None:
        """Count a record of the partition that was read into the buffer; ``time`` is the broker's, in Unix seconds."""
        if source in self._partitions:
            self._partitions[source].buffered[offset] += 1
            self._partitions[source].times[offset] = time

    def remove_buffered(self, source: SourcePartition, offset: int) -> None:
        """Count a buffered record as written, skipped or deferred."""
        if source in self._partitions:
            buffered = self._partitions[source].buffered
            buffered[offset] -= 1
            if buffered[offset] <= 0:
                del buffered[offset]
                self._partitions[source].times.pop(offset, None)

    def next_offset(self, source: SourcePartition) -> int | None:
        """Return the next offset of the tables; None if it is unknown."""
        return self._partitions[source].next_offset if source in self._partitions else None

    def set_next_offset(self, source: SourcePartition, offset: int) -> None:
        """Set the next offset of the tables."""
        if source in self._partitions:
            partition = self._partitions[source]
            if partition.next_offset is None or offset > partition.next_offset:
                partition.last_progress = self._clock()
                partition.paused_by = None
            partition.next_offset = offset

    def pause(self, source: SourcePartition, paused_by: str) -> bool:
        """Pause a partition until its next offset moves. Return False if it was paused already."""
        if source not in self._partitions or self._partitions[source].paused_by == paused_by:
            return False
        self._partitions[source].paused_by = paused_by
        self._partitions[source].last_seek = self._clock()
        return True

    def paused(self) -> dict[int, str]:
        """Return the trace formats of records that pause their partitions, by partition."""
        return {s.partition: p.paused_by for s, p in self._partitions.items() if p.paused_by}

    def set_log(self, source: SourcePartition, log: LogRange) -> None:
        """Set the range of the partition's offsets on the broker."""
        if source in self._partitions:
            partition = self._partitions[source]
            if log.stable_end >= log.end or log.stable_end != partition.log.stable_end:
                partition.last_stable = self._clock()
            partition.log = log
            partition.out_of_range = (
                partition.next_offset is not None and not log.start <= partition.next_offset <= log.end
            )

    def reset_stalls(self) -> None:
        """Restart the stall timers: no record could arrive, because the broker was unreachable."""
        for partition in self._partitions.values():
            partition.last_progress = self._clock()

    def postpone_stalls(self, seconds: float) -> None:
        """Leave out a time in which no record could arrive, because reading waited for the tables."""
        for partition in self._partitions.values():
            partition.last_progress = min(partition.last_progress + seconds, self._clock())

    def set_found(self, source: SourcePartition, offset: int, time: float) -> None:
        """Set the time of the first record from ``offset`` on, which is not in the buffer."""
        if source in self._partitions:
            self._partitions[source].found = (offset, time)

    def oldest_unread_time(self, source: SourcePartition) -> float | None:
        """Return the Unix time of the record at the next offset; None without one, or while its time is unknown."""
        partition = self._partitions[source]
        next_offset = partition.next_offset
        if next_offset is None or next_offset >= partition.log.end:
            return None
        if partition.found is not None and partition.found[0] == next_offset:
            return partition.found[1]
        return partition.times.get(next_offset)

    def undated(self) -> list[SourcePartition]:
        """Return the partitions with a record to read whose time is unknown."""
        return [
            source
            for source, partition in self._partitions.items()
            if partition.next_offset is not None
            and partition.next_offset < partition.log.stable_end
            and self.oldest_unread_time(source) is None
        ]

    def stalled_s(self, source: SourcePartition) -> float:
        """Return for how long the next offset has not moved, although its record should have arrived."""
        partition = self._partitions[source]
        next_offset = partition.next_offset
        waits = next_offset in partition.buffered or partition.paused_by
        if next_offset is None or next_offset >= partition.log.stable_end or waits:
            partition.last_progress = self._clock()
        return self._clock() - partition.last_progress

    def transaction_s(self, source: SourcePartition) -> float:
        """Return for how long an open transaction has kept records of a partition from all consumers."""
        partition = self._partitions[source]
        return 0.0 if partition.log.stable_end >= partition.log.end else self._clock() - partition.last_stable

    def record_seek(self, source: SourcePartition) -> None:
        """Record that the consumer was sent to the next offset."""
        if source in self._partitions:
            self._partitions[source].last_seek = self._clock()

    def stalled(self, after_s: float) -> list[SourcePartition]:
        """Return the partitions that are stalled for more than ``after_s``, also since the last seek, and the paused
        ones that are due to be read again."""
        now = self._clock()
        return [
            source
            for source, partition in self._partitions.items()
            if min(self.stalled_s(source), now - partition.last_seek) > after_s
            or (partition.paused_by and now - partition.last_seek > PAUSE_RETRY_S)
        ]

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
                end_offset=max(partition.log.end, partition.next_offset),
                lag=max(partition.log.end - partition.next_offset, 0),
                stalled_s=round(self.stalled_s(source), 1),
                transaction_s=round(self.transaction_s(source), 1),
                oldest_unread_time=self.oldest_unread_time(source),
                paused_by=partition.paused_by,
            )
            for source, partition in sorted(self._partitions.items())
            if partition.next_offset is not None
        ]


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
    """By partition: its next offset did not move, although its record should have arrived."""
    transaction_s: Mapping[int, float]
    """By partition: an open transaction keeps records from all consumers."""
    without_offset: tuple[int, ...]
    """Partitions whose next offset was not read from the tables yet."""
    paused: Mapping[int, str]
    """By partition: the trace format of the record at its next offset, which this worker cannot read."""
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
        f"partition {partition}: records wait, and the next offset has not moved for {seconds:.0f} s"
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
    problems += [
        f"partition {partition}: records wait for a producer's transaction, which has been open for {seconds:.0f} s"
        for partition, seconds in sorted(health.transaction_s.items())
        if seconds > TRANSACTION_TIMEOUT_S
    ]
    problems += [
        f"partition {partition} is paused: its next record has the format {found}, this worker reads {FORMAT}; upgrade "
        f"the stream workers, or pass the record with `aurora stream skip`"
        for partition, found in sorted(health.paused.items())
    ]
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
