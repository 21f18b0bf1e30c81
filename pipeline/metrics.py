"""The counters of a stream worker and its HTTP endpoints: ``/live``, ``/ready``, ``/status`` and ``/metrics``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import faust
from faust.web import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
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


def add_endpoints(app: faust.App, status: Callable[[], StreamStatus]) -> None:
    """Add the HTTP endpoints to the app's web server."""

    def answer(problems: Sequence[str]) -> Response:
        return app.web.json({"why": list(problems)}, status=503 if problems else 200)

    async def live(*_: object) -> Response:
        return answer(status().not_live)

    async def ready(*_: object) -> Response:
        return answer(status().not_ready)

    async def as_json(*_: object) -> Response:
        return app.web.bytes(status().model_dump_json().encode(), content_type="application/json")

    async def metrics(*_: object) -> Response:
        return app.web.bytes(exposition(status()), headers={"Content-Type": CONTENT_TYPE_LATEST})

    for path, view in (("/live", live), ("/ready", ready), ("/status", as_json), ("/metrics", metrics)):
        app.page(path)(view)


class StreamCollector:
    """The stream worker's metrics, collected from its status."""

    def __init__(self, status: StreamStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        status = self._status
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
        yield from drift_metrics(status.drift)
        yield GaugeMetricFamily("aurora_stream_buffer_bytes", "Bytes read and not written yet", status.buffer_bytes)
        yield GaugeMetricFamily("aurora_stream_live", "1 if the worker is live", not status.not_live)
        yield GaugeMetricFamily(
            "aurora_stream_ready", "1 if the next record would reach the tables", not status.not_ready
        )
        if status.last_commit_time is not None:
            yield GaugeMetricFamily(
                "aurora_stream_last_commit_timestamp_seconds", "Unix time of the last commit", status.last_commit_time
            )


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


def exposition(status: StreamStatus) -> bytes:
    """Return the status in the Prometheus text format."""
    registry = CollectorRegistry()
    register_process_metrics(registry)
    registry.register(StreamCollector(status))
    return generate_latest(registry)
