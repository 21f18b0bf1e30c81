"""The stream worker is killed again and again while traffic runs; the tables then equal what was published."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import KafkaError, Message, Producer

from pipeline import topics
from pipeline.batches import Record, build
from pipeline.table import DeltaLog
from schemas import trace
from schemas.batches import TABLES
from schemas.settings import Kafka, Settings, Stream, Tables, to_environ
from schemas.trace import ROOT, Chunk, Envelope, Round, encode, to_bf16

Headers = list[tuple[str, bytes | None]]

WORKER = """
from schemas import logs, settings
from pipeline.app import run
logs.configure("stream")
run(settings.load())
"""
ROOT_FOLDER = Path(__file__).resolve().parent.parent.parent
RECORDS = 3_000
CORRUPT_SHARE = 0.02
KILLS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)


@dataclass
class Ledger:
    """Every record that the broker acknowledged, with the coordinates that it was given."""

    records: list[Record] = field(default_factory=list)
    errors: list[KafkaError] = field(default_factory=list)

    def delivered(self, headers: Headers, error: KafkaError | None, message: Message) -> None:
        """Note a record; the message of a delivery report has no headers."""
        if error is not None:
            self.errors.append(error)
            return
        _, milliseconds = message.timestamp()
        self.records.append(
            Record(
                message.topic() or "",
                message.partition() or 0,
                message.offset() or 0,
                milliseconds * 1000,
                message.key(),
                message.value(),
                tuple(headers),
            )
        )


def chunk(request: int, rng: np.random.Generator) -> Chunk:
    """A short request with two or three rounds."""
    rounds: list[Round] = []
    position, root = 0, 1
    for number in range(int(rng.integers(2, 4))):
        drafted = tuple(map(int, rng.integers(0, 999, 3))) if number else ()
        kept = int(rng.integers(0, 4)) if number else 0
        tokens = (root, *drafted[:kept]) if number else tuple(map(int, rng.integers(0, 999, 5)))
        root = int(rng.integers(0, 999))
        rounds.append(
            Round(
                round=number,
                position=position,
                tokens=tokens,
                features=to_bf16(rng.standard_normal((len(tokens), 12)).astype(np.float32)),
                draft_tokens=drafted,
                draft_parents=tuple(range(ROOT, len(drafted) - 1)),
                draft_logprobs=tuple(-rng.random(len(drafted))),
                accepted=tuple(range(kept)),
                bonus=root,
                top_ids=rng.integers(0, 999, (1 + len(drafted), 2), dtype=np.int32),
                top_logprobs=-rng.random((1 + len(drafted), 2), dtype=np.float32),
                speculator="3" if number else "",
                draft_us=1,
                verify_us=2,
                time_us=request,
            )
        )
        position += len(tokens)
    envelope = Envelope(
        request=f"request-{request}",
        chunk=0,
        last=True,
        node="node-0",
        target="target",
        line="line",
        features="inline",
        feature_width=12,
        top_k=2,
        temperature=0.0,
        top_p=1.0,
    )
    return Chunk(envelope, tuple(rounds))


def publish(settings: Settings, ledger: Ledger, until: threading.Event, done: threading.Event) -> None:
    """Publish until enough was sent and the last worker was killed; one record in fifty has a flipped bit."""
    rng = np.random.default_rng(0)
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap, "enable.idempotence": True})
    sent = 0
    while sent < RECORDS or not until.is_set():
        made = chunk(sent, rng)
        value = bytearray(encode(made))
        if rng.random() < CORRUPT_SHARE:
            value[int(rng.integers(len(value)))] ^= 1 << int(rng.integers(8))
        headers: Headers = [
            ("content-type", trace.CONTENT_TYPE.encode()),
            ("schema", trace.fingerprint().encode()),
            ("rows", str(len(made.rounds)).encode()),
        ]
        producer.produce(
            settings.kafka.traces_topic,
            bytes(value),
            key=made.envelope.request.encode(),
            headers=list(headers),
            on_delivery=partial(ledger.delivered, headers),
        )
        producer.poll(0.01)
        sent += 1
    producer.flush()
    done.set()


@contextmanager
def worker(settings: Settings, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environ = {**os.environ, **to_environ(settings), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen([sys.executable, "-c", WORKER], env=environ, cwd=ROOT_FOLDER, stderr=output)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.mark.timeout(300)
def test_the_tables_equal_what_was_published(broker: str, tmp_path: Path, free_port: Callable[[], int]) -> None:
    settings = Settings(
        kafka=Kafka(bootstrap=broker, traces_topic=f"traces-{tmp_path.name}", speculators_topic=f"s-{tmp_path.name}"),
        tables=Tables(uri=str(tmp_path / "tables")),
        stream=Stream(
            port=free_port(), group=f"group-{tmp_path.name}", data_dir=str(tmp_path), flush_s=0.2, flush_records=64
        ),
    )
    topics.create(settings.kafka)
    ledger, killed, published = Ledger(), threading.Event(), threading.Event()
    publisher = threading.Thread(target=publish, args=(settings, ledger, killed, published))
    publisher.start()
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
        publisher.join()
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


def rows_of_records(tables: DeltaLog) -> int:
    """Records in the tables: each gives one row of either."""
    return tables.row_count("accepted") + tables.row_count("dead_letters")


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
