"""Reads the chunks of a request from the topic."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from confluent_kafka import Consumer, TopicPartition

from pipeline.batches import Record, build
from schemas.settings import Kafka
from schemas.trace.decoder import decode
from schemas.trace.record import Chunk, DraftSource, VerifyStep


def chunks_of(kafka: Kafka, request: str, timeout_s: float = 20) -> list[Chunk]:
    """Return all chunks of a request, named by its id or by a label of its own, once its last one is in the topic."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = [chunk for chunk in every_chunk(kafka) if request in (chunk.envelope.request, chunk.envelope.label)]
        if any(chunk.envelope.last for chunk in found):
            return sorted(found, key=lambda chunk: chunk.envelope.chunk)
        assert time.monotonic() < deadline, f"no last chunk of {request}"
        time.sleep(0.3)


def every_chunk(kafka: Kafka) -> list[Chunk]:
    return [decode(record.value or b"") for record in every_record(kafka)]


def every_record(kafka: Kafka) -> list[Record]:
    consumer = Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": "test", "enable.auto.commit": False})
    records: list[Record] = []
    for number in range(kafka.partitions):
        partition = TopicPartition(kafka.traces_topic, number, 0)
        _, end = consumer.get_watermark_offsets(partition, timeout=10)
        consumer.assign([partition])
        for _ in range(end):
            record = consumer.poll(10)
            assert record is not None
            assert record.error() is None
            headers: Any = record.headers()
            time_us = record.timestamp()[1] * 1000
            place = kafka.traces_topic, number, record.offset() or 0, time_us
            records.append(Record(*place, record.key(), record.value(), tuple(headers)))
    consumer.close()
    return records


def rows_of(kafka: Kafka) -> dict[str, int]:
    """Return the number of rows that the stream writes to each table for the whole topic."""
    return {name: rows.num_rows for name, rows in build(every_record(kafka), 32).rows.items()}


def verify_steps_in(chunks: Sequence[Chunk]) -> list[VerifyStep]:
    return [r for chunk in chunks for r in chunk.verify_steps]


def all_tokens(verify_steps: Sequence[VerifyStep]) -> list[int]:
    """Return every token of the verify steps, the last bonus token included."""
    return [
        *(token for r in verify_steps for token in r.tokens),
        *([] if verify_steps[-1].bonus is None else [verify_steps[-1].bonus]),
    ]


def count_accepted_by_source(chunks: Iterable[Chunk], version: str) -> dict[str, int]:
    """Return how many draft tokens of the speculator's ``version`` and of the suffix drafter alone were accepted.

    Every draft token names its source, and a verify step names the version if the speculator drafted or nothing did.
    """
    accepted = {"suffix": 0, "version": 0}
    for chunk in chunks:
        for step in chunk.verify_steps:
            if not step.verify_step:
                continue
            sources = step.draft_sources or (DraftSource.SPECULATOR,) * len(step.draft_tokens)
            assert len(sources) == len(step.draft_tokens)
            is_drafted = any(source & DraftSource.SPECULATOR for source in sources) or not sources
            assert step.speculator == (version if is_drafted else "")
            for node in step.accepted:
                accepted["version" if sources[node] & DraftSource.SPECULATOR else "suffix"] += 1
    return accepted
