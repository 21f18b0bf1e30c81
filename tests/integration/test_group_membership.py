"""A restarted stream worker: a static member of its group takes its partitions back while the others keep theirs."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from stream_worker import Publisher, rows_of_records, stream_settings, wait_until, worker

from pipeline import topics
from pipeline.delta import DeltaLog
from schemas.settings import Settings


def member(settings: Settings, name: str, port: int, *, is_static: bool) -> Settings:
    """Return the settings of a worker of the group."""
    changed = {
        "port": port,
        "data_dir": f"{settings.stream.data_dir}/{name}",
        "session_timeout": 45.0,
        "static_member": name if is_static else "",
    }
    return settings.model_copy(update={"stream": settings.stream.model_copy(update=changed)})


def assignments(log: Path) -> list[list[int]]:
    """Return the partitions of each assignment that a worker logged."""
    lines = log.read_text().splitlines() if log.exists() else []
    events = [json.loads(line) for line in lines if '"partitions_assigned"' in line]
    return [event["partitions"] for event in events]


@pytest.mark.parametrize("is_static", [True, False], ids=["static", "dynamic"])
def test_a_restart_of_a_static_member_does_not_reassign_the_partitions_of_the_others(
    broker: str, tmp_path: Path, free_port: Callable[[], int], *, is_static: bool
) -> None:
    settings = stream_settings(broker, tmp_path, free_port())
    topics.create(settings.kafka)
    publisher, tables = Publisher(settings), DeltaLog(settings.tables)
    restarted, other = (member(settings, name, free_port(), is_static=is_static) for name in ("worker-0", "worker-1"))
    log, others_log, log_after = (tmp_path / name for name in ("before.log", "other.log", "after.log"))

    def is_shared() -> bool:
        newest = [found[-1] if (found := assignments(path)) else [] for path in (log, others_log)]
        return sorted(newest) == [[0], [1]]

    with worker(other, others_log):
        with worker(restarted, log) as process:
            assert wait_until(is_shared, 60), others_log.read_text()[-3_000:]
            before, others = assignments(log)[-1], assignments(others_log)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        with worker(restarted, log_after):
            assert wait_until(lambda: bool(assignments(log_after)), 60), log_after.read_text()[-3_000:]
            publisher.send_many(range(60))
            assert wait_until(lambda: rows_of_records(tables) >= 60, 60), log_after.read_text()[-3_000:]
            if is_static:
                assert assignments(log_after) == [before]
                assert assignments(others_log) == others
            else:
                assert assignments(others_log) != others
