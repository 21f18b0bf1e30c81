"""Whether a stream worker does its work: what it knows of itself, what follows from it, and what ends it.

A worker is *live* while it makes progress or has none to make: also with no partition, with the broker away, or with a
store that is slow or refuses. One that is not live for too long ends itself, and its supervisor starts it again. It is
*ready* when nothing keeps the next record from the tables.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog

log = structlog.get_logger()

TICK_S = 1.0
LATE_S = 15.0
"""Records wait and none is taken, or the watch does not come verify step: from then on the worker is not live."""
JOINING_S = 90.0
"""The same for the group's answer, which may wait for other workers (``REBALANCE_S`` in ``pipeline.worker``)."""
STORE_S = 900.0
"""The same for one attempt on the tables: longer than the store's own timeouts and retries take."""
STALLED_S = 60.0
"""A worker that is not live for so long ends."""
PATIENCE_S = 8.0
"""For calls that still run when all else has ended; supervisors commonly wait 15 s."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """For how many seconds each of these has lasted; 0 where it does not."""

    unwatched_s: float
    """Since the watch came verify step."""
    joining_s: float
    """The group has not said which partitions are this worker's, although the broker answers."""
    storing_s: float
    """One attempt on the tables."""
    waiting_s: Mapping[int, float]
    """By partition: records are on the broker and none of them arrived."""
    unknown: tuple[int, ...]
    """Partitions for which the tables have yet to say where they stand."""
    error: str | None
    """What was wrong with the broker or the tables last, and is not put right."""


def not_live(vitals: Vitals) -> list[str]:
    """Why the worker is not live; empty when it is."""
    why = []
    if vitals.unwatched_s > LATE_S + TICK_S:
        why.append(f"the watch has not come verify step for {vitals.unwatched_s:.0f} s")
    if vitals.joining_s > JOINING_S:
        why.append(f"the group has not assigned partitions for {vitals.joining_s:.0f} s")
    if vitals.storing_s > STORE_S:
        why.append(f"the tables have not answered for {vitals.storing_s:.0f} s (tables.uri)")
    why += [
        f"partition {partition}: records wait and none has arrived for {seconds:.0f} s"
        for partition, seconds in sorted(vitals.waiting_s.items())
        if seconds > LATE_S
    ]
    return why


def not_ready(vitals: Vitals) -> list[str]:
    """Why the next record would not reach the tables; empty when it would."""
    why = not_live(vitals)
    if vitals.joining_s > 0:
        why.append("the group has not assigned partitions yet")
    if vitals.unknown:
        why.append(f"the tables have not said yet where they stand in partitions {list(vitals.unknown)}")
    if vitals.error:
        why.append(vitals.error)
    return why


class Watchdog(threading.Thread):
    """Ends the process when nothing was well for too long; a thread, because the event loop may be what hangs."""

    def __init__(self, well_at: Callable[[], float]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._well_at = well_at

    def run(self) -> None:
        """Wait for the worst."""
        while time.monotonic() - self._well_at() < STALLED_S:
            time.sleep(TICK_S)
        log.critical("stalled", seconds=STALLED_S, why="the worker is not live; the supervisor starts it again")
        # Not sys.exit: a hanging event loop would wait for itself. The tables are the truth, so nothing is lost.
        os._exit(1)


class LastCall(threading.Thread):
    """Ends a process that is done and does not end: a client's call that hangs would be waited for without end."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        super().__init__(name="last-call", daemon=True)
        self._patience_s = patience_s

    def run(self) -> None:
        """Wait; where the process is still there, tell what each of its threads does."""
        time.sleep(self._patience_s)
        log.warning("ended_in_the_middle_of_a_call", seconds=self._patience_s)
        faulthandler.dump_traceback()
        # A commit that is cut off is finished by the next worker: the tables are the truth.
        os._exit(0)
