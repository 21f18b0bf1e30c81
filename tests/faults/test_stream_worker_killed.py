"""The stream worker is killed again and again while traffic runs; the tables then equal what was published."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stream_worker import Publisher, chunk, rows_of_records, stream_settings, wait_until, worker

from pipeline import topics
from pipeline.batches import build
from pipeline.table import DeltaLog
from schemas.batches import TABLES
from schemas.trace import encode

RECORDS = 3_000
CORRUPT_SHARE = 0.02
KILLS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)


def publish(publisher: Publisher, until: threading.Event) -> None:
    """Publish until enough was sent and the last worker was killed; one record in fifty has a flipped bit."""
    rng = np.random.default_rng(0)
    sent = 0
    while sent < RECORDS or not until.is_set():
        made = chunk(sent, rng)
        value = bytearray(encode(made))
        if rng.random() < CORRUPT_SHARE:
            value[int(rng.integers(len(value)))] ^= 1 << int(rng.integers(8))
        publisher.send(made, bytes(value))
        time.sleep(0.01)
        sent += 1
    publisher.flush()


@pytest.mark.timeout(300)
def test_the_tables_equal_what_was_published(broker: str, tmp_path: Path, free_port: Callable[[], int]) -> None:
    settings = stream_settings(broker, tmp_path, free_port())
    topics.create(settings.kafka)
    publisher, killed = Publisher(settings), threading.Event()
    traffic = threading.Thread(target=publish, args=(publisher, killed))
    traffic.start()
    log = tmp_path / "worker.log"
    tables = DeltaLog(settings.tables)
    try:
        alive = random.Random(0)
        for kill in KILLS:
            with worker(settings, log) as process:
                seen = commits(tables)
                # Not before it wrote something, so that every kill meets a worker at work; then at any moment.
                assert wait_until(lambda seen=seen: commits(tables) > seen, 60), log.read_text()[-5_000:]
                time.sleep(alive.uniform(0, 3))
                process.send_signal(kill)
                assert process.wait(20) == (0 if kill == signal.SIGTERM else -kill), log.read_text()[-5_000:]
    finally:
        killed.set()
        traffic.join()
    ledger = publisher.ledger
    assert not ledger.errors
    with worker(settings, log):
        assert wait_until(lambda: rows_of_records(tables) >= len(ledger.records), 90), log.read_text()[-5_000:]
        time.sleep(1)

    expected = build(sorted(ledger.records, key=lambda r: (r.partition, r.offset)), settings.stream.context_tokens)
    assert expected.rows["dead_letters"].num_rows > RECORDS * CORRUPT_SHARE / 3
    for name, rows in expected.rows.items():
        stored = tables.read(name).sort_by([("partition", "ascending"), ("offset", "ascending")])
        assert stored.schema == TABLES[name]
        assert stored.num_rows == rows.num_rows, name
        assert stored.equals(rows), name


def commits(tables: DeltaLog) -> int:
    return tables.version("accepted")
