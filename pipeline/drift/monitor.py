"""Drift beside a stream worker: every partition watched, its state rebuilt where it is not known, its events sent.

Whatever happens here stops no record: after a failure the state is unknown, which the next commit notices, and an event
that the broker does not take is counted and logged. Events are sent at least once: after a restart those of the newest
``SENT_AGAIN`` records go out a second time, equal to the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa
import structlog

from pipeline.drift.detector import COLUMNS, Key, PartitionWatch, observations, rebuilt_from
from pipeline.offsets import Source
from schemas.events import AcceptanceStats, DriftEvent
from schemas.settings import Drift
from schemas.status import DriftStatus, TrafficStatus

log = structlog.get_logger()

SENT_AGAIN = 1_000
"""Records before the first one of a worker whose events it sends again: more than a commit holds."""
NEWEST = 10
"""Events that the worker's status shows."""
SHOWN = 50
"""Versions and labels that the status and the metrics show, those with the most requests: clients choose labels."""


class VerifySteps(Protocol):
    """The part of the Delta log that is used here."""

    def read_offsets(self, name: str, source: Source, offsets: range, columns: tuple[str, ...]) -> pa.Table:
        """Rows that a range of one partition's records gave."""


class Events(Protocol):
    """Where events go."""

    @property
    def unsent(self) -> int:
        """Events that were given up."""

    def send(self, event: DriftEvent) -> None:
        """Send one without waiting for it."""

    def poll(self) -> None:
        """Look what became of those that were sent."""


@dataclass
class _Watched:
    """A partition, and the offset before which all is observed."""

    watch: PartitionWatch
    reached: int
    figures: Mapping[Key, AcceptanceStats] = field(default_factory=dict)


class DriftWatch:
    """Watches the partitions of a worker. One thread observes; ``status`` may be asked from another."""

    def __init__(self, settings: Drift, verify_steps: VerifySteps, events: Events) -> None:
        self._settings = settings
        self._verify_steps = verify_steps
        self._events = events
        self._watched: dict[Source, _Watched] = {}
        self._newest: dict[str, DriftEvent] = {}
        self._seen = self._failed = 0

    def observe(self, source: Source, offsets: range, verify_steps: pa.Table) -> None:
        """Take what was committed: the rows of ``traces`` that these offsets of a partition gave."""
        watched = self._watched.get(source)
        try:
            if watched is None or watched.reached != offsets.start:
                watched = self._rebuilt(source, offsets.start)
            for event in _events(watched.watch, verify_steps):
                self._tell(event)
            watched.figures = watched.watch.figures()
            self._events.poll()
            watched.reached = offsets.stop
            self._watched[source] = watched
        except Exception as error:  # noqa: BLE001 - a by-product: whatever fails in it must not keep records from the tables
            self._failed += 1
            self._watched.pop(source, None)
            log.warning("drift_not_watched", partition=source.partition, why=repr(error))

    def keep(self, sources: Iterable[Source]) -> None:
        """Forget the partitions that are not among these."""
        kept = set(sources)
        self._watched = {source: watched for source, watched in self._watched.items() if source in kept}

    def status(self) -> DriftStatus:
        """The newest events, and what each version and label shows over the partitions of this worker."""
        figures: dict[Key, list[AcceptanceStats]] = {}
        for watched in list(self._watched.values()):
            for key, of_partition in watched.figures.items():
                figures.setdefault(key, []).append(of_partition)
        traffic = [TrafficStatus(**key._asdict(), acceptance=_together(parts)) for key, parts in figures.items()]
        traffic.sort(key=lambda shown: -shown.acceptance.requests)
        return DriftStatus(
            detected=self._seen,
            dropped=self._events.unsent,
            failed=self._failed,
            newest=list(self._newest.values()),
            traffic=traffic[:SHOWN],
        )

    def _rebuilt(self, source: Source, offset: int) -> _Watched:
        """The state before an offset, from the table; what may not have been sent is sent."""
        again = max(0, offset - SENT_AGAIN)
        start = rebuilt_from(again, self._settings.window_records)
        watch = PartitionWatch(source, self._settings)
        if start < offset:
            for event in _events(
                watch, self._verify_steps.read_offsets("traces", source, range(start, offset), COLUMNS)
            ):
                if event.offset >= again:
                    self._tell(event)
        return _Watched(watch, offset)

    def _tell(self, event: DriftEvent) -> None:
        if event.id not in self._newest:
            self._seen += 1
            log.warning("drift", **event.model_dump(mode="json"))
            self._newest = dict([*self._newest.items(), (event.id, event)][-NEWEST:])
        self._events.send(event)


def _events(watch: PartitionWatch, verify_steps: pa.Table) -> Iterator[DriftEvent]:
    for seen in observations(verify_steps):
        event = watch.observe(seen)
        if event is not None:
            yield event


def _together(parts: list[AcceptanceStats]) -> AcceptanceStats:
    """The figures of several partitions as if they were one."""
    requests = sum(part.requests for part in parts)

    def mean(name: str) -> float:
        total: float = sum(part.requests * getattr(part, name) for part in parts)
        return total / requests

    return AcceptanceStats(
        requests=requests,
        first_token_acceptance=mean("first_token_acceptance"),
        acceptance_length=mean("acceptance_length"),
        draft_tokens=mean("draft_tokens"),
    )
