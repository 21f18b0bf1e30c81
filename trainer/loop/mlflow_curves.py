"""Curves of a training for people: one MLflow run for each life of a trainer, fed from a thread of its own.

Training hands over its figures of every step and goes on; what is sent is their mean over an interval. While the
registry is away the points wait, the oldest ones giving way to new ones once there are very many.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Protocol

from trainer.release.registry import MetricPoint, RegistryError
from trainer.status import ErrorTracker

WAITING = 20_000
"""Points that are kept for a registry that is away: some three hours of them."""
AT_ONCE = 500
"""Points in a call; MLflow takes a thousand."""


class Runs(Protocol):
    """The part of the registry that is used here; every call may raise ``RegistryError``."""

    def start_run(self, line: str, tags: Mapping[str, str], parameters: Mapping[str, object]) -> str:
        """Begin a run, and return its id."""

    def log_metrics(self, run: str, points: list[MetricPoint]) -> None:
        """Add points to the curves of a run."""

    def end_run(self, run: str) -> None:
        """Say that nothing more comes."""


class Curves:
    """The run of this life."""

    def __init__(
        self,
        runs: Runs,
        errors: ErrorTracker,
        line: str,
        every_s: float,
        tags: Mapping[str, str],
        parameters: Mapping[str, object],
    ) -> None:
        self.run: str | None = None
        """Id of the run; None until the registry was first there."""
        self._runs, self._errors, self._line, self._every_s = runs, errors, line, every_s
        self._tags, self._parameters = dict(tags), dict(parameters)
        self._lock = threading.Lock()
        self._sums: dict[str, tuple[float, int]] = {}
        self._step = 0
        self._waiting: deque[MetricPoint] = deque(maxlen=WAITING)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._send_often, name="curves", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take the figures of a step; those that are not finite are no points of a curve."""
        with self._lock:
            self._step = step
            for name, value in values.items():
                if math.isfinite(value):
                    total, number = self._sums.get(name, (0.0, 0))
                    self._sums[name] = total + value, number + 1

    def close(self) -> None:
        """Send what there is, once, and end the run."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()

    def _send_often(self) -> None:
        while not self._ending.wait(self._every_s):
            self._send()
        self._send()
        with self._errors.catch("curves", RegistryError):
            if self.run is not None:
                self._runs.end_run(self.run)

    def _send(self) -> None:
        with self._lock:
            sums, self._sums, step = self._sums, {}, self._step
        now = int(time.time() * 1000)
        self._waiting.extend(MetricPoint(name, total / number, step, now) for name, (total, number) in sums.items())
        with self._errors.catch("curves", RegistryError):
            if self.run is None and self._waiting:
                self.run = self._runs.start_run(self._line, self._tags, self._parameters)
            while self._waiting and self.run is not None:
                points = [self._waiting[i] for i in range(min(AT_ONCE, len(self._waiting)))]
                self._runs.log_metrics(self.run, points)
                for _ in points:
                    self._waiting.popleft()
