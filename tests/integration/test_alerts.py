"""Alerts on a real stream worker, scraped by a real Prometheus whose rules count a second for each minute."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from prometheus_server import Prometheus, needs_prometheus, write_fast_rules
from stream_worker import Publisher, stream_settings, wait_until, worker

from pipeline import topics

OTHERS = {"AuroraProcessAbsent"}
"""Prometheus knows no node, trainer and promoter here."""


@needs_prometheus
def test_alerts_fire_while_the_tables_fail_and_stop_when_they_are_back(
    broker: str, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    settings = stream_settings(broker, tmp_path, free_port())
    topics.create(settings.kafka)
    publisher, numbers = Publisher(settings), itertools.count(step=2)
    rules = write_fast_rules(tmp_path / "fast.rules.yml")
    prometheus = Prometheus(tmp_path / "prometheus", free_port(), {"stream": settings.stream.port}, rules)
    tables, away, log = tmp_path / "tables", tmp_path / "away", tmp_path / "worker.log"

    def publish_until(condition: Callable[[], bool], timeout_s: float) -> bool:
        def publish_and_look() -> bool:
            start = next(numbers)
            publisher.send_many(range(start, start + 2))
            return condition()

        return wait_until(publish_and_look, timeout_s)

    with worker(settings, log), prometheus.running():
        assert publish_until(lambda: prometheus.firing() == OTHERS, 60), prometheus.firing()

        tables.rename(away)
        tables.write_text("a file where the tables were")
        expected = OTHERS | {"AuroraStreamNotCommitting", "AuroraStreamStalled", "AuroraNotReady"}
        assert publish_until(lambda: expected <= prometheus.firing(), 90), prometheus.firing()
        ages = prometheus.values("time() - min(aurora_stream_oldest_unread_timestamp_seconds)", "1s")
        assert max(ages) > 10

        tables.unlink()
        away.rename(tables)
        assert publish_until(lambda: prometheus.firing() <= OTHERS, 90), prometheus.firing()
        assert prometheus.values("aurora_stream_record_delay_seconds_count", "1s")[-1] > 0
