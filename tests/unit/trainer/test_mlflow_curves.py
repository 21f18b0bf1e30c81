"""MLflow curves are sent as means over an interval, and buffered while the registry is unreachable."""

from __future__ import annotations

import math
from collections.abc import Mapping

from prometheus_client import CollectorRegistry

from trainer.loop.metrics import Throughput
from trainer.loop.mlflow_curves import MAX_BUFFERED, MlflowCurves
from trainer.release.registry import MetricPoint, RegistryError
from trainer.status import ErrorTracker


class FakeRegistry:
    """A registry that keeps runs in memory, and can be unreachable."""

    def __init__(self) -> None:
        self.away = False
        self.points: list[MetricPoint] = []
        self.calls = self.begun = 0
        self.ended: list[str] = []

    def start_run(self, line: str, tags: Mapping[str, str], parameters: Mapping[str, object]) -> str:
        self._answer()
        self.begun += 1
        return f"run of {line}"

    def log_metrics(self, run: str, points: list[MetricPoint]) -> None:
        self._answer()
        self.calls += 1
        self.points += points

    def end_run(self, run: str) -> None:
        self._answer()
        self.ended.append(run)

    def _answer(self) -> None:
        if self.away:
            raise RegistryError("away")


def curves_of(runs: FakeRegistry) -> tuple[MlflowCurves, ErrorTracker]:
    failures = ErrorTracker("train", ("curves",), CollectorRegistry())
    return MlflowCurves(runs, failures, "line", 3600, {}, {}), failures


def test_a_point_is_the_mean_since_the_last_point() -> None:
    runs = FakeRegistry()
    curves, _ = curves_of(runs)
    for step, loss in ((1, 4.0), (2, 2.0), (3, 3.0)):
        curves.add(step, {"loss": loss, "rate": 0.1})
    curves._send()
    curves.add(4, {"loss": 1.0})
    curves._send()
    assert [(p.name, p.value, p.step) for p in runs.points[:1] + runs.points[2:]] == [
        ("loss", 3.0, 3),
        ("loss", 1.0, 4),
    ]
    assert runs.begun == 1
    assert curves.run == "run of line"


def test_values_that_are_not_finite_are_dropped() -> None:
    runs = FakeRegistry()
    curves, _ = curves_of(runs)
    curves.add(1, {"loss": math.nan, "norm": math.inf})
    curves._send()
    assert (runs.points, runs.begun) == ([], 0)


def test_points_are_buffered_while_the_registry_is_unreachable() -> None:
    runs = FakeRegistry()
    runs.away = True
    curves, failures = curves_of(runs)
    for step in range(1, 4):
        curves.add(step, {"loss": float(step)})
        curves._send()
    assert failures.summary == "curves: away"
    assert curves.run is None
    runs.away = False
    curves._send()
    assert [p.step for p in runs.points] == [1, 2, 3]
    assert failures.summary is None


def test_the_newest_points_are_kept_when_the_buffer_is_full() -> None:
    runs = FakeRegistry()
    runs.away = True
    curves, _ = curves_of(runs)
    for step in range(MAX_BUFFERED + 10):
        curves.add(step, {"loss": 1.0})
        curves._send()
    runs.away = False
    curves._send()
    assert (len(runs.points), runs.points[0].step, runs.points[-1].step) == (MAX_BUFFERED, 10, MAX_BUFFERED + 9)
    assert runs.calls > 1, "no call exceeds what the registry accepts"


def test_closing_sends_the_remaining_points_and_ends_the_run() -> None:
    runs = FakeRegistry()
    curves, _ = curves_of(runs)
    curves.start()
    curves.add(7, {"loss": 1.0})
    curves.close()
    assert [p.step for p in runs.points] == [7]
    assert runs.ended == ["run of line"]


def test_throughput_is_that_of_the_last_minute() -> None:
    now = [100.0]
    pace = Throughput(lambda: now[0])
    for _ in range(10):
        now[0] += 1
        last = pace.add(50)
    assert last == 50
    now[0] += 600
    assert pace.add(50) < 1
    for _ in range(100):
        now[0] += 1
        last = pace.add(200)
    assert 195 < last < 205
