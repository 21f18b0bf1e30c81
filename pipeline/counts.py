"""What a stream worker counts, and how it says so: ``/status`` for programs, ``/metrics`` for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from schemas.status import PartitionStatus


@dataclass
class Counts:
    """Counters since the start of the process."""

    rows_written: int = 0
    """Rounds that went into ``traces``."""
    bytes_taken: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)
    """Records that could not be used, by reason."""
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


_HELP = {
    "rows_written": "Verify rounds written to the traces table",
    "bytes_taken": "Bytes of the records taken from the topic",
    "skipped_behind": "Records that the tables contained already",
    "left_out": "Records left out until their turn comes",
    "seeks_back": "Seeks back to the offset that the tables want",
    "commits": "Batches committed to the tables",
    "fenced": "Commits refused because another owner had written",
    "table_errors": "Failed reads and writes of the tables",
    "lost": "Records that the broker deleted before they were read",
}


class _Collector:
    def __init__(self, counts: Counts, partitions: Iterable[PartitionStatus]) -> None:
        self._counts = counts
        self._partitions = partitions

    def collect(self) -> Iterator[Metric]:
        for name, text in _HELP.items():
            yield CounterMetricFamily(f"aurora_stream_{name}", text, value=getattr(self._counts, name))
        dead = CounterMetricFamily("aurora_stream_dead_letters", "Records that could not be used", labels=["reason"])
        for reason, number in self._counts.dead_letters.items():
            dead.add_metric([reason], number)
        yield dead
        wanted = GaugeMetricFamily("aurora_stream_wanted_offset", "Next offset of the tables", labels=["partition"])
        lag = GaugeMetricFamily("aurora_stream_lag_records", "Records the tables lack", labels=["partition"])
        for partition in self._partitions:
            wanted.add_metric([str(partition.partition)], partition.wanted)
            lag.add_metric([str(partition.partition)], max(partition.end - partition.wanted, 0))
        yield wanted
        yield lag


def exposition(counts: Counts, partitions: Iterable[PartitionStatus]) -> bytes:
    """Prometheus text of the counters and of how far each partition is."""
    registry = CollectorRegistry()
    registry.register(_Collector(counts, partitions))
    return generate_latest(registry)
