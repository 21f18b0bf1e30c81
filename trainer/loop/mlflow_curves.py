"""The training curves in MLflow: one run per trainer process, sent from a separate thread.

Training adds the figures of every step without blocking; the thread sends their mean over an interval. While the
registry is unreachable, points are buffered; beyond ``MAX_BUFFERED`` the oldest ones are dropped.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping

from trainer.release.registry import MetricPoint, RegistryError, SpeculatorRegistry
from trainer.status import ErrorTracker

MAX_BUFFERED = 20_000
"""Points buffered for an unreachable registry: about three hours of training."""
POINTS_PER_CALL = 500
"""MLflow accepts a thousand."""


class MlflowCurves:
    """The MLflow run of this process."""

    def __init__(
        self,
        registry: SpeculatorRegistry,
        errors: ErrorTracker,
        line: str,
        interval_s: float,
        tags: Mapping[str, str],
        parameters: Mapping[str, object],
    ) -> None:
        self.run: str | None = None
        """Id of the run; None until the registry first answered."""
        self._registry, self._errors, self._line, self._interval_s = registry, errors, line, interval_s
        self._tags, self._parameters = dict(tags), dict(parameters)
        self._lock = threading.Lock()
        self._sums: dict[str, tuple[float, int]] = {}
        self._step = 0
        self._buffer: deque[MetricPoint] = deque(maxlen=MAX_BUFFERED)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send_periodically, name="curves", daemon=True)

    def start(self) -> None:
        """Start the sending thread."""
        self._thread.start()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add the figures of a step, except those that are not finite."""
        with self._lock:
            self._step = step
            for name, value in values.items():
                if math.isfinite(value):
                    total, number = self._sums.get(name, (0.0, 0))
                    self._sums[name] = total + value, number + 1

    def close(self) -> None:
        """Send the remaining points once, and end the run."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _send_periodically(self) -> None:
        while not self._closing.wait(self._interval_s):
            self._send()
        self._send()
        with self._errors.catch("curves", RegistryError):
            if self.run is not None:
                self._registry.end_run(self.run)

    def _send(self) -> None:
        with self._lock:
            sums, self._sums, step = self._sums, {}, self._step
        now = int(time.time() * 1000)
        self._buffer.extend(MetricPoint(name, total / number, step, now) for name, (total, number) in sums.items())
        with self._errors.catch("curves", RegistryError):
            if self.run is None and self._buffer:
                self.run = self._registry.start_run(self._line, self._tags, self._parameters)
            while self._buffer and self.run is not None:
                points = [self._buffer[i] for i in range(min(POINTS_PER_CALL, len(self._buffer)))]
                self._registry.log_metrics(self.run, points)
                for _ in points:
                    self._buffer.popleft()
