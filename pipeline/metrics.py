"""The counters of a stream worker and its HTTP endpoints: ``/live``, ``/ready``, ``/status`` and ``/metrics``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import faust
from faust.web import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from pipeline.dead_letters.reasons import REASONS
from pipeline.maintenance import MAINTENANCE_ACTIONS
from schemas.status import DriftStatus, StreamStatus
from schemas.telemetry.metrics import counts_by, register_process_metrics


@dataclass
class StreamCounters:
    """Counters since the start of the process."""

    rows_written: int = 0
    """Verify steps written to ``traces``."""
    consumed_bytes: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)
    """Unusable records by reason."""
    chunk_gaps: int = 0
    """Chunks without the chunk before them: it was dropped, became a dead letter, or is older than the window."""
    records_skipped: int = 0
    """Records that the tables contained already."""
    records_deferred: int = 0
    """Records above the next offset, or of partitions that this worker lost."""
    seeks: int = 0
    commits: int = 0
    commits_fenced: int = 0
    """Commits rejected because another worker had written."""
    table_errors: int = 0
    records_lost: int = 0
    """Records that the broker deleted before they were read."""
    hole_offsets: int = 0
    """Offsets at which no consumer receives a record."""
    last_commit_time: float | None = None
    """Unix time."""


class StreamTimes:
    """Histograms of a stream worker. Written by the writer's thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._commit = Histogram(
            "aurora_stream_commit_duration_seconds",
            "Time from the building of a batch's rows to the commit of the last table",
            buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300),
            registry=self.registry,
        )
        self._delay = Histogram(
            "aurora_stream_record_delay_seconds",
            "Time from the arrival of a record at the broker to its commit to the tables",
            buckets=(0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800, 3600, 6 * 3600, 86_400),
            registry=self.registry,
        )

    def observe(self, commit_s: float, delays_s: Iterable[float]) -> None:
        """Observe a commit, and the delays of its records."""
        self._commit.observe(commit_s)
        for delay_s in delays_s:
            self._delay.observe(max(delay_s, 0.0))  # the broker's clock may be ahead


_COUNTERS = {
    "rows_written": "Verify steps written to the traces table",
    "consumed_bytes": "Bytes of the records that were written",
    "chunk_gaps": "Chunks without the chunk before them",
    "records_skipped": "Records that the tables contained already",
    "records_deferred": "Records above the next offset, to be delivered again",
    "seeks": "Seeks of the consumer to the next offset of the tables",
    "commits": "Batches committed to the tables",
    "commits_fenced": "Commits rejected because another worker had written",
    "table_errors": "Failed reads and writes of the tables",
    "records_lost": "Records that the broker deleted before they were read",
    "hole_offsets": "Offsets at which no consumer receives a record: ends of transactions, and aborted records",
}
_PARTITION_GAUGES = {
    "next_offset": ("next_offset", "Next offset of the tables"),
    "lag_records": ("lag", "Records on the broker that the tables lack"),
    "partition_stalled_seconds": ("stalled_s", "Time for which records waited and the next offset did not move"),
    "partition_transaction_seconds": ("transaction_s", "Time for which records waited for an open transaction"),
    "partition_paused": ("is_paused", "1 if the next record has another major version of the trace format"),
}
_TRAFFIC_GAUGES = {
    "first_token_acceptance_ratio": (
        "first_token_acceptance",
        "Ratio of the version's own drafts whose first token was accepted, since the last drift",
    ),
    "acceptance_length": (
        "acceptance_length",
        "Mean tokens per verify step with an own draft of the version, bonus token included, since the last drift",
    ),
}


def add_endpoints(app: faust.App, status: Callable[[], StreamStatus], times: StreamTimes) -> None:
    """Add the HTTP endpoints to the app's web server."""
    registry = times.registry
    register_process_metrics(registry)
    registry.register(StreamCollector(status))

    def answer(problems: Sequence[str]) -> Response:
        return app.web.json({"why": list(problems)}, status=503 if problems else 200)

    async def live(*_: object) -> Response:
        return answer(status().not_live)

    async def ready(*_: object) -> Response:
        return answer(status().not_ready)

    async def as_json(*_: object) -> Response:
        return app.web.bytes(status().model_dump_json().encode(), content_type="application/json")

    async def metrics(*_: object) -> Response:
        return app.web.bytes(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    for path, view in (("/live", live), ("/ready", ready), ("/status", as_json), ("/metrics", metrics)):
        app.page(path)(view)


class StreamCollector:
    """The stream worker's metrics, collected from its status."""

    def __init__(self, status: Callable[[], StreamStatus]) -> None:
        self._status, self._start = status, time.time()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        status = self._status()
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"aurora_stream_{name}", text, value=getattr(status, name))
        yield counts_by("aurora_stream_dead_letters", "Unusable records", "reason", REASONS, status.dead_letters)
        yield counts_by(
            "aurora_stream_maintenance_files",
            "Files handled by maintenance",
            "action",
            MAINTENANCE_ACTIONS,
            status.maintenance_files,
        )
        for name, (attribute, text) in _PARTITION_GAUGES.items():
            gauge = GaugeMetricFamily(f"aurora_stream_{name}", text, labels=["partition"])
            for partition in status.partitions:
                gauge.add_metric([str(partition.partition)], getattr(partition, attribute))
            yield gauge
        yield from _time_metrics(status, self._start)
        yield from drift_metrics(status.drift)
        yield GaugeMetricFamily(
            "aurora_stream_topic_log",
            "Number of the topic's log that is read: one more for each time the topic was created anew",
            status.topic_log,
        )
        yield GaugeMetricFamily("aurora_stream_buffer_bytes", "Bytes read and not written yet", status.buffer_bytes)
        yield GaugeMetricFamily("aurora_stream_live", "1 if the worker is live", not status.not_live)
        yield GaugeMetricFamily(
            "aurora_stream_ready", "1 if the next record would reach the tables", not status.not_ready
        )


def _time_metrics(status: StreamStatus, start: float) -> Iterator[Metric]:
    """Yield the Unix times from which alerts derive ages, and what they are compared with.

    Args:
        status: Of the worker.
        start: Unix time of the worker's start, from which a worker without a commit counts.
    """
    unread = GaugeMetricFamily(
        "aurora_stream_oldest_unread_timestamp_seconds",
        "Unix time at which the broker received the oldest record that the tables lack; no series where they lack none",
        labels=["partition"],
    )
    for partition in status.partitions:
        if partition.oldest_unread_time is not None:
            unread.add_metric([str(partition.partition)], partition.oldest_unread_time)
    yield unread
    for name, text, value in (
        (
            "last_commit_timestamp_seconds",
            "Unix time of the last commit, or of the worker's start before the first one",
            status.last_commit_time or start,
        ),
        (
            "last_maintenance_timestamp_seconds",
            "Unix time of the last maintenance run without an error, on the worker that runs maintenance",
            status.last_maintenance_time,
        ),
        ("maintenance_interval_seconds", "tables.maintenance_interval", status.maintenance_interval_s),
        ("retention_seconds", "kafka.retention: how long the broker keeps a record", status.retention_s),
    ):
        if value is not None:
            yield GaugeMetricFamily(f"aurora_stream_{name}", text, value)


def drift_metrics(drift: DriftStatus) -> Iterator[Metric]:
    """Yield the acceptance by version and label, and the drift events."""
    yield CounterMetricFamily("aurora_stream_drift_events", "Drift events", value=drift.detected)
    yield CounterMetricFamily(
        "aurora_stream_drift_events_dropped", "Drift events that were not sent", value=drift.dropped
    )
    for name, (attribute, text) in _TRAFFIC_GAUGES.items():
        gauge = GaugeMetricFamily(f"aurora_stream_{name}", text, labels=["line", "speculator", "label"])
        for traffic in drift.traffic:
            labels = [traffic.line, traffic.speculator, traffic.label or ""]
            gauge.add_metric(labels, getattr(traffic.acceptance, attribute))
        yield gauge
