"""Registration beside training: snapshots of the weights are registered on a thread of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Literal

import structlog

from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from schemas.telemetry import spans
from trainer.loop.metrics import TrainMetrics
from trainer.release.evaluation import Evaluation
from trainer.release.registration import LineageRecord, Registrar, TrainingLineage, trained_on_spans
from trainer.release.registry import RegistryError
from trainer.status import ErrorTracker

log = structlog.get_logger()

MIN_BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
"""Time before a failed registration is tried again; it doubles with every failure in a row."""

DropReason = Literal["replaced", "rolled_back", "shutdown"]


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSnapshot:
    """The weights of a training step and their origin, which later steps do not change."""

    step: int
    mark: int
    """Of the lineage up to that step."""
    draft: EagleDraft
    evaluation: Evaluation
    """Of the same weights on the held-out set."""
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Registration:
    snapshot: TrainingSnapshot
    lineage: LineageRecord
    version: Future[str | None]


class RegistrationQueue:
    """Registers one snapshot at a time; at most one more waits, and a newer one replaces it.

    A failed registration is tried again after a back-off, with the newest snapshot. Only the registration itself runs
    on the other thread: call the methods from the thread that trains, and ``poll`` between its steps.
    """

    def __init__(
        self,
        registrar: Registrar,
        line: str,
        lineage: TrainingLineage,
        errors: ErrorTracker,
        metrics: TrainMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registered: tuple[str, ...] = ()
        """Versions registered since the start."""
        self._registrar, self._line, self._lineage, self._errors = registrar, line, lineage, errors
        self._metrics, self._clock = metrics, clock
        self._running: _Registration | None = None
        self._waiting: TrainingSnapshot | None = None
        self._failures = 0
        self._retry_at = clock()

    def submit(self, snapshot: TrainingSnapshot) -> None:
        """Register a snapshot if it is better than the version registered last, as soon as no other is registered."""
        if self._waiting is not None:
            self._drop(self._waiting, "replaced")
        self._waiting = snapshot

    def poll(self) -> str | None:
        """Take the result of a registration that has ended, and start the next one; return a new version."""
        version = None
        if self._running is not None and self._running.version.done():
            running, self._running = self._running, None
            version = self._finish(running)
        if self._running is None and self._waiting is not None and self._clock() >= self._retry_at:
            waiting, self._waiting = self._waiting, None
            self._running = self._start(waiting)
        return version

    def drop_rolled_back(self) -> None:
        """Give up a waiting snapshot that the lineage was rolled back behind."""
        if self._waiting is not None and not self._lineage.has(self._waiting.mark):
            self._drop(self._waiting, "rolled_back")
            self._waiting = None

    def close(self, timeout_s: float) -> None:
        """Wait until everything is registered, a registration fails, or the time is over; then give up the rest."""
        end = self._clock() + timeout_s
        while (self._running or (self._waiting and not self._failures)) and (left := end - self._clock()) > 0:
            if self._running:
                wait([self._running.version], left)
            self.poll()
        unfinished = (self._running.snapshot if self._running else None, self._waiting)
        self._running = self._waiting = None
        for snapshot in unfinished:
            if snapshot is not None:
                self._drop(snapshot, "shutdown")

    def _start(self, snapshot: TrainingSnapshot) -> _Registration:
        lineage = self._lineage.read(snapshot.mark)
        started = _Registration(snapshot, lineage, Future())
        tags = {**snapshot.tags, "parent": lineage.parent}

        def register() -> None:
            try:
                version = self._registrar.register_if_better(
                    snapshot.draft, snapshot.evaluation, tags, snapshot.metrics
                )
                started.version.set_result(version)
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that trains
                started.version.set_exception(error)

        # A daemon: a registry that hangs must not keep a process from ending.
        threading.Thread(target=register, name="registration", daemon=True).start()
        return started

    def _finish(self, ended: _Registration) -> str | None:
        with self._errors.catch("registration", RegistryError, CheckpointError):
            version = ended.version.result()
            self._failures = 0
            if version is None:
                self._lineage.keep(ended.snapshot.mark)
            else:
                self._record(version, ended)
            return version
        self._retry_at = self._clock() + min(MIN_BACKOFF_S * 2**self._failures, MAX_BACKOFF_S)
        self._failures += 1
        if not self._lineage.has(ended.snapshot.mark):
            self._drop(ended.snapshot, "rolled_back")
        elif self._waiting is not None:
            self._drop(ended.snapshot, "replaced")
        else:
            self._waiting = ended.snapshot
        return None

    def _record(self, version: str, ended: _Registration) -> None:
        self._lineage.register(version, ended.lineage)
        self.registered = (*self.registered, version)
        self._metrics.versions_registered.inc()
        for span in trained_on_spans(self._line, version, ended.lineage, time.time()):
            spans.record(span)

    def _drop(self, snapshot: TrainingSnapshot, reason: DropReason) -> None:
        self._metrics.registrations_dropped.labels(reason).inc()
        self._lineage.keep(snapshot.mark)
        log.info("registration_dropped", step=snapshot.step, reason=reason)
