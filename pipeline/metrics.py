"""What a stream worker counts, and how it says so: ``/status`` for programs, ``/metrics`` for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from schemas.status import DriftStatus, StreamStatus
from schemas.telemetry.metrics import register_process_metrics


@dataclass
class Counts:
    """Counters since the start of the process."""

    rows_written: int = 0
    """Verify steps that went into ``traces``."""
    bytes_taken: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)
    """Records that could not be used, by reason."""
    gaps: int = 0
    """Chunks whose one before is not known: it was shed, became a dead letter, or came too long ago."""
    skipped_behind: int = 0
    """Records that the tables contained already."""
    left_out: int = 0
    """Records that came before their turn, or of partitions that are not this worker's any more."""
    seeks_back: int = 0
    commits: int = 0
    fenced: int = 0
    """Commits refused because another owner had written."""
    table_errors: int = 0
    lost: int = 0
    """Records that the broker had deleted before they were read."""


_COUNTERS = {
    "rows_written": ("rows_written", "Verify steps written to the traces table"),
    "bytes_taken": ("consumed_bytes", "Bytes of the records taken from the topic"),
    "gaps": ("chunk_gaps", "Chunks whose one before is not known"),
    "skipped_behind": ("records_skipped", "Records that the tables contained already"),
    "left_out": ("records_deferred", "Records left out until their turn comes"),
    "seeks_back": ("seeks", "Seeks back to the offset that the tables want"),
    "commits": ("commits", "Batches committed to the tables"),
    "fenced": ("commits_fenced", "Commits refused because another owner had written"),
    "table_errors": ("table_errors", "Failed reads and writes of the tables"),
    "lost": ("records_lost", "Records that the broker deleted before they were read"),
}
_PER_PARTITION = {
    "wanted_offset": ("next_offset", "Next offset of the tables"),
    "lag_records": ("lag", "Records the tables lack"),
    "waiting_seconds": ("stalled_s", "For how long records have waited on the broker while none of them arrived"),
}


_ACCEPTANCE = {
    "first_token_acceptance_ratio": (
        "first_token_acceptance",
        "Ratio of verify steps whose first draft token was accepted, since the last drift",
    ),
    "acceptance_length": (
        "acceptance_length",
        "1 + accepted tokens per verify step (bonus token included), since the last drift",
    ),
}


class _Collector:
    def __init__(self, status: StreamStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status
        for name, (attribute, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"aurora_stream_{name}", text, value=getattr(status, attribute))
        dead = CounterMetricFamily("aurora_stream_dead_letters", "Records that could not be used", labels=["reason"])
        for reason, number in status.dead_letters.items():
            dead.add_metric([reason], number)
        yield dead
        files = CounterMetricFamily("aurora_stream_maintained", "Files of the tables looked after", labels=["what"])
        for what, number in status.maintenance_files.items():
            files.add_metric([what], number)
        yield files
        for name, (attribute, text) in _PER_PARTITION.items():
            gauge = GaugeMetricFamily(f"aurora_stream_{name}", text, labels=["partition"])
            for partition in status.partitions:
                gauge.add_metric([str(partition.partition)], getattr(partition, attribute))
            yield gauge
        yield from drift_metrics(status.drift)
        yield GaugeMetricFamily("aurora_stream_held_bytes", "Bytes that wait for the tables", value=status.buffer_bytes)
        yield GaugeMetricFamily("aurora_stream_live", "1 while there is progress or none to make", not status.not_live)
        yield GaugeMetricFamily("aurora_stream_ready", "1 while nothing is in the way", not status.not_ready)
        if status.last_commit_time is not None:
            yield GaugeMetricFamily(
                "aurora_stream_last_commit_timestamp_seconds", "Unix time of the last commit", status.last_commit_time
            )


def drift_metrics(drift: DriftStatus) -> Iterator[Metric]:
    """How much is accepted by version and label, and how often that changed."""
    yield CounterMetricFamily("aurora_stream_drift_events", "Changes of acceptance", value=drift.detected)
    yield CounterMetricFamily("aurora_stream_drift_events_unsent", "Events never sent", value=drift.dropped)
    for name, (attribute, text) in _ACCEPTANCE.items():
        gauge = GaugeMetricFamily(f"aurora_stream_{name}", text, labels=["line", "speculator", "label"])
        for shown in drift.traffic:
            gauge.add_metric([shown.line, shown.speculator, shown.label or ""], getattr(shown.acceptance, attribute))
        yield gauge


def exposition(status: StreamStatus) -> bytes:
    """Prometheus text of a worker's state."""
    registry = CollectorRegistry()
    register_process_metrics(registry)
    registry.register(_Collector(status))
    return generate_latest(registry)
