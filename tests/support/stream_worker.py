"""A stream worker process, and a publisher with a ledger, for the tests of the stream."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from bfloat16 import to_bf16
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

from pipeline.batches import Record
from pipeline.delta import DeltaLog
from pipeline.offsets import NEVER_READ
from schemas.claim_store import ClaimStore
from schemas.settings import Kafka, Settings, Stream, Tables, to_environ
from schemas.trace import record as trace
from schemas.trace.record import ROOT, Chunk, Envelope, VerifyStep, encode
from serving.traces.chunks import drop_features

Headers = list[tuple[str, bytes | None]]

WORKER = """
from schemas import settings
from pipeline.worker import run
run(settings.load())
"""
CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass
class Ledger:
    """Records that the broker acknowledged, with their coordinates."""

    records: list[Record] = field(default_factory=list)
    reasons: dict[tuple[int, int], str] = field(default_factory=dict)
    """Expected reasons of dead letters, by partition and offset."""
    errors: list[KafkaError] = field(default_factory=list)

    def delivered(self, headers: Headers, reason: str, error: KafkaError | None, message: Message) -> None:
        """Add a record. The message of a delivery report has no headers."""
        if error is not None:
            self.errors.append(error)
            return
        _, milliseconds = message.timestamp()
        record = Record(
            message.topic() or "",
            message.partition() or 0,
            message.offset() or 0,
            milliseconds * 1000,
            message.key(),
            message.value(),
            tuple(headers),
        )
        self.records.append(record)
        if reason:
            self.reasons[record.partition, record.offset] = reason


def chunk(request: int, rng: np.random.Generator) -> Chunk:
    """Return a short request with two or three verify steps."""
    verify_steps: list[VerifyStep] = []
    position, root = 0, 1
    for number in range(int(rng.integers(2, 4))):
        drafted = tuple(map(int, rng.integers(0, 999, 3))) if number else ()
        accepted = int(rng.integers(0, 4)) if number else 0
        tokens = (root, *drafted[:accepted]) if number else tuple(map(int, rng.integers(0, 999, 5)))
        root = int(rng.integers(0, 999))
        verify_steps.append(
            VerifyStep(
                verify_step=number,
                position=position,
                tokens=tokens,
                features=to_bf16(rng.standard_normal((len(tokens), 12)).astype(np.float32)),
                draft_tokens=drafted,
                draft_parents=tuple(range(ROOT, len(drafted) - 1)),
                draft_logprobs=tuple(-rng.random(len(drafted))),
                accepted=tuple(range(accepted)),
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
    return Chunk(envelope, tuple(verify_steps))


def claimed_chunks(requests: range, store: ClaimStore) -> list[Chunk]:
    """Return chunks whose features are in the claim store."""
    rng, made = np.random.default_rng(requests.start), []
    for request in requests:
        whole = chunk(request, rng)
        claim = store.put(np.concatenate([r.features for r in whole.verify_steps]), request)
        envelope = replace(whole.envelope, features="claim-check", claim=claim)
        made.append(Chunk(envelope, tuple(map(drop_features, whole.verify_steps))))
    return made


def stream_settings(broker: str, folder: Path, port: int) -> Settings:
    """Return settings with a topic, a group and tables of the test."""
    return Settings(
        kafka=Kafka(
            bootstrap_servers=broker,
            traces_topic=f"traces-{folder.name}",
            speculators_topic=f"speculators-{folder.name}",
            answers_topic=f"answers-{folder.name}",
            drift_topic=f"drift-{folder.name}",
        ),
        # Short, so that maintenance runs in every test of the stream.
        tables=Tables(uri=str(folder / "tables"), maintenance_interval=2),
        stream=Stream(
            port=port,
            group_id=f"group-{folder.name}",
            data_dir=str(folder),
            flush_interval=0.2,
            flush_records=64,
            session_timeout=6,
        ),
    )


class Publisher:
    """Sends records like a node."""

    def __init__(self, settings: Settings, **options: object) -> None:
        """Connect. ``options`` are those of librdkafka's producer."""
        self.ledger = Ledger()
        self._topic = settings.kafka.traces_topic
        self._producer = Producer(
            {
                **settings.kafka.client_options,
                "bootstrap.servers": settings.kafka.bootstrap_servers,
                "enable.idempotence": True,
                "log_level": 0,
                **options,
            }
        )

    @contextmanager
    def transaction(self, *, abort: bool = False) -> Iterator[None]:
        """Send what the block sends in one transaction. The records of an aborted one are not in the ledger."""
        kept = len(self.ledger.records)
        self._producer.begin_transaction()
        yield
        self.flush()
        if abort:
            self._producer.abort_transaction()
            del self.ledger.records[kept:]
        else:
            self._producer.commit_transaction()

    def send(self, made: Chunk, value: bytes | None, reason: str = "", time_ms: int = 0) -> None:
        """Send ``value`` under the key and headers of a chunk.

        Args:
            made: The chunk of the key and the headers.
            value: The bytes that are sent.
            reason: Expected reason of the dead letter; empty if the record is valid.
            time_ms: Clock of the node in Unix milliseconds; 0 for the clock of this machine.
        """
        headers: Headers = [
            ("content-type", trace.CONTENT_TYPE.encode()),
            ("schema", trace.SCHEMA_ID.encode()),
            ("rows", str(len(made.verify_steps)).encode()),
        ]
        self._producer.produce(
            self._topic,
            value,
            key=made.envelope.request.encode(),
            headers=list(headers),
            timestamp=time_ms,
            on_delivery=partial(self.ledger.delivered, headers, reason),
        )
        self._producer.poll(0)

    def send_many(self, requests: range) -> None:
        """Send one valid chunk per request, and wait until the broker has acknowledged them."""
        rng = np.random.default_rng(requests.start)
        for request in requests:
            made = chunk(request, rng)
            self.send(made, encode(made))
        self.flush()

    def flush(self) -> None:
        """Wait until the broker has acknowledged everything."""
        self._producer.flush()


@contextmanager
def worker(
    settings: Settings, log: Path, variables: Mapping[str, str] = MappingProxyType({}), *, before: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a stream worker until the block ends.

    Args:
        settings: Its settings.
        log: File that its log is appended to.
        variables: Added to its environment.
        before: Python code that runs in the process first, to inject a fault.
    """
    environ = {**os.environ, **to_environ(settings), "OMP_NUM_THREADS": "1", **variables}
    with log.open("ab") as output:
        process = subprocess.Popen([sys.executable, "-c", before + WORKER], env=environ, cwd=CHECKOUT, stderr=output)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def transactional_publisher(settings: Settings) -> Publisher:
    """Return a publisher whose records are sent in transactions."""
    made = Publisher(settings, **{"transactional.id": f"publisher-{settings.stream.group_id}"})
    made._producer.init_transactions(30)
    return made


def rows_of_records(tables: DeltaLog) -> int:
    """Return the number of records in the tables: each has one row in one of two tables."""
    letters = tables.read("dead_letters", ["reason"])["reason"].to_pylist()
    return tables.row_count("accepted") + sum(reason not in NEVER_READ for reason in letters)


def offsets_never_read(tables: DeltaLog, reason: str) -> list[tuple[int, int]]:
    """Return partition and offset of what the tables record with a reason of ``NEVER_READ``, in order."""
    return sorted(
        (row["partition"], offset)
        for row in tables.read("dead_letters", ["partition", "reason", "detail"]).to_pylist()
        if row["reason"] == reason
        for first, last in re.findall(r"(\d+) to (\d+)", row["detail"].split(":")[0])
        for offset in range(int(first), int(last) + 1)
    )


def offsets_without_record(settings: Settings, ledger: Ledger) -> list[tuple[int, int]]:
    """Return partition and offset of everything in the log that is not in the ledger, in order."""
    topic, known = settings.kafka.traces_topic, {(record.partition, record.offset) for record in ledger.records}
    consumer = Consumer({"bootstrap.servers": settings.kafka.bootstrap_servers, "group.id": "watermarks"})
    ends = [consumer.get_watermark_offsets(TopicPartition(topic, p), 10)[1] for p in range(settings.kafka.partitions)]
    consumer.close()
    return [at for p, end in enumerate(ends) for offset in range(end) if (at := (p, offset)) not in known]


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
