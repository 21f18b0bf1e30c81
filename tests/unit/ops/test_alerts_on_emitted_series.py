"""Alerts fire, and do not fire, on series that the processes' own collectors emit; promtool judges them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from echo_engine import EchoEngine
from emitted_series import INTERVAL_S, EmittedSeries
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_server import needs_prometheus

from pipeline.health import ProgressTracker
from pipeline.metrics import StreamCollector, StreamCounters, StreamTimes
from pipeline.offsets import LogRange, SourcePartition
from schemas.settings import Settings
from schemas.status import DriftStatus, StreamStatus
from serving.http import status
from serving.http.generation import RequestMetrics
from serving.http.server import Drain
from serving.traces.accounting import TraceAccounting
from trainer import train
from trainer.loop.metrics import TrainMetrics
from trainer.release import promoter
from trainer.release.promoter import PromoterMetrics
from trainer.status import ErrorTracker

pytestmark = needs_prometheus

START = 1_800_000_000.0
RETENTION_S = 3 * 3600.0
ZERO = SourcePartition("traces", 0)
Fault = Callable[["Loop"], None]


class Traces:
    """The publisher's part of a node's report."""

    circuit_breaker = "closed"

    def __init__(self) -> None:
        self.accounting = TraceAccounting()
        self.counts = self.accounting.counts

    def collect(self) -> Iterator[Metric]:
        return self.counts().metrics()


class Loop:
    """Node, stream worker, trainer and promoter with traffic, without threads and on a simulated clock."""

    def __init__(self) -> None:
        self.now = START
        self.emitted = EmittedSeries(START)
        self.engine, self.drain, self.traces = EchoEngine(), Drain(), Traces()
        registry, self.app = CollectorRegistry(), FastAPI()
        self.requests = RequestMetrics(registry)
        status.add_routes(
            self.app, "node-0", self.engine, self.requests, registry, status.Reports(self.traces), self.drain
        )
        self.client = TestClient(self.app)
        self.counters, self.times = StreamCounters(), StreamTimes()
        self.progress = ProgressTracker(lambda: self.now)
        self.progress.assign([ZERO])
        self.written = self.end = 0
        self.progress.set_next_offset(ZERO, 0)
        self.not_ready: list[str] = []
        self.last_maintenance = START
        collector = StreamCollector(self.stream_status)
        collector._start = START
        self.times.registry.register(collector)
        self.train_registry, self.promoter_registry = CollectorRegistry(), CollectorRegistry()
        self.train_metrics = TrainMetrics(self.train_registry)
        self.train_errors = ErrorTracker("train", train.PARTS, self.train_registry)
        self.promoter_metrics = PromoterMetrics(self.promoter_registry)
        self.promoter_errors = ErrorTracker("promoter", promoter.PARTS, self.promoter_registry)
        self.rows_per_minute, self.records_written = 50, 10
        self.samples_all, self.maintains, self.has_trainer = True, True, True

    def stream_status(self) -> StreamStatus:
        return StreamStatus(
            **{name: value for name, value in vars(self.counters).items() if name != "dead_letters"},
            dead_letters=dict(self.counters.dead_letters),
            partitions=self.progress.statuses(),
            buffer_bytes=0,
            not_live=[],
            not_ready=self.not_ready,
            drift=DriftStatus(detected=0, dropped=0, failed=0, newest=[], traffic=[]),
            maintenance_files={},
            last_maintenance_time=self.last_maintenance,
            maintenance_interval_s=Settings().tables.maintenance_interval,
            retention_s=RETENTION_S,
            error=None,
        )

    def run(self, minutes: int, fault: Fault = lambda _: None) -> None:
        """Let traffic pass, and scrape every minute after ``fault`` has been applied."""
        for _ in range(minutes):
            self._pass_traffic()
            fault(self)
            self.emitted.add("serve", "node:8000", self.client.get("/metrics").text)
            self.emitted.add("stream", "stream:16066", generate_latest(self.times.registry).decode())
            if self.has_trainer:
                self.emitted.add("train", "train:16067", generate_latest(self.train_registry).decode())
            self.emitted.add("promoter", "promoter:16068", generate_latest(self.promoter_registry).decode())
            self.emitted.end_interval()
            self.now += INTERVAL_S

    def _pass_traffic(self) -> None:
        for _ in range(10):
            self.requests.count("stop")
            self.traces.accounting.count_request(sampled=self.samples_all)
        if self.samples_all:
            self.traces.accounting.capture(self.rows_per_minute, 1, 1 << 30)
            self.traces.accounting.publish(self.rows_per_minute, 1)
        for offset in range(self.end, self.end + 10):
            self.progress.add_buffered(ZERO, offset, self.now)
        self.end += 10
        self.progress.set_log(ZERO, LogRange(0, self.end, self.end))
        if self.records_written:
            written = min(self.written + self.records_written, self.end)
            for offset in range(self.written, written):
                self.progress.remove_buffered(ZERO, offset)
            self.written = written
            self.progress.set_next_offset(ZERO, written)
            self.counters.commits += 1
            self.counters.rows_written += self.rows_per_minute
            self.counters.last_commit_time = self.now
            self.times.observe(0.2, [1.0])
        if self.maintains and self.emitted.scrapes % 10 == 0:
            self.last_maintenance = self.now
        self.train_metrics._steps.inc(5)


@pytest.fixture
def loop() -> Loop:
    return Loop()


def test_a_healthy_loop_raises_no_alert(loop: Loop, tmp_path: Path) -> None:
    loop.run(150)
    loop.emitted.assert_firing([], tmp_path)


def drop_for_lag(loop: Loop) -> None:
    loop.traces.accounting.reject(500, "trainer_lag")


def drop_features(loop: Loop) -> None:
    loop.traces.accounting.drop_features(50, 0)


def sample_nothing(loop: Loop) -> None:
    loop.samples_all = False


@pytest.mark.parametrize("fault", [drop_for_lag, drop_features, sample_nothing])
def test_an_intended_budget_raises_no_alert(loop: Loop, fault: Fault, tmp_path: Path) -> None:
    loop.run(150, fault)
    loop.emitted.assert_firing([], tmp_path)


def fail_request(loop: Loop) -> None:
    if loop.now == START + 20 * INTERVAL_S:
        loop.requests.count("failed")


def lose_records(loop: Loop) -> None:
    if loop.now == START + 20 * INTERVAL_S:
        loop.counters.records_lost = 7


def reject_record(loop: Loop) -> None:
    if loop.now == START + 20 * INTERVAL_S:
        loop.counters.dead_letters["corrupt"] = 1


def roll_back(loop: Loop) -> None:
    if loop.now == START + 20 * INTERVAL_S:
        loop.promoter_metrics.rollbacks.labels("champion").inc()


@pytest.mark.parametrize(
    ("event", "alert"),
    [
        (fail_request, "AuroraRequestsFailed"),
        (lose_records, "AuroraRecordsLost"),
        (reject_record, "AuroraDeadLetters"),
        (roll_back, "AuroraVersionRolledBack"),
    ],
)
def test_an_alert_fires_on_the_first_event_of_its_kind(loop: Loop, event: Fault, alert: str, tmp_path: Path) -> None:
    loop.run(23, event)
    loop.emitted.assert_firing([alert], tmp_path)


def stop_tables(loop: Loop) -> None:
    loop.records_written, loop.not_ready = 0, ["table traces: no answer"]


def never_commit(loop: Loop) -> None:
    stop_tables(loop)
    loop.counters.last_commit_time = None


def slow_tables(loop: Loop) -> None:
    loop.records_written = 5


def stop_capture(loop: Loop) -> None:
    loop.rows_per_minute = 0


def stop_maintenance(loop: Loop) -> None:
    loop.maintains = False


def remove_trainer(loop: Loop) -> None:
    loop.has_trainer = False


def fail_registry(loop: Loop) -> None:
    with loop.promoter_errors.catch("registry", OSError):
        raise OSError("registry.tracking_uri: no answer")


def drain(loop: Loop) -> None:
    loop.drain.start()


@pytest.mark.parametrize(
    ("minutes", "fault", "alerts"),
    [
        (9, stop_tables, ["AuroraStreamNotCommitting"]),
        (9, never_commit, ["AuroraStreamNotCommitting"]),
        (40, stop_tables, ["AuroraNotReady", "AuroraStreamNotCommitting", "AuroraStreamStalled"]),
        (
            140,
            stop_tables,
            ["AuroraNotReady", "AuroraRecordsExpire", "AuroraStreamNotCommitting", "AuroraStreamStalled"],
        ),
        (19, slow_tables, []),
        (60, slow_tables, ["AuroraStreamBehind"]),
        (40, stop_capture, ["AuroraNothingRecorded"]),
        (55, stop_maintenance, []),
        (70, stop_maintenance, ["AuroraMaintenanceOverdue"]),
        (12, remove_trainer, ["AuroraProcessAbsent"]),
        (40, fail_registry, ["AuroraCallErrors", "AuroraNotReady"]),
        (40, drain, ["AuroraNotReady"]),
    ],
)
def test_an_alert_fires_while_its_condition_holds(
    loop: Loop, minutes: int, fault: Fault, alerts: list[str], tmp_path: Path
) -> None:
    loop.run(5)
    loop.run(minutes, fault)
    loop.emitted.assert_firing(alerts, tmp_path)
