"""Batches of Kafka records whose header names are any bytes. Clients write text only."""

from __future__ import annotations

import asyncio
from unittest import mock

from aiokafka import AIOKafkaProducer
from aiokafka.producer import message_accumulator
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy

PLACEHOLDER = "16-bytes-of-text"
NOT_UTF8 = b"\xff\xfe" * 8
Headers = list[tuple[str, bytes | None]]


class RawNames(_DefaultRecordBatchBuilderPy):  # type: ignore[misc]  # final by declaration only
    """Writes ``NOT_UTF8`` instead of ``PLACEHOLDER``."""

    def build(self) -> bytearray:
        self._buffer = self._buffer.replace(PLACEHOLDER.encode(), NOT_UTF8)
        return super().build()


def build_batch(records: list[tuple[bytes, bytes, Headers]], compression: int = 0) -> bytes:
    """Return a batch of records with key, value and headers."""
    builder = RawNames(2, compression, 0, -1, -1, -1, 1 << 20)
    for offset, (key, value, headers) in enumerate(records):
        builder.append(offset, 1_000 + offset, key, value, headers)
    return bytes(builder.build())


def send(bootstrap: str, topic: str, partition: int, records: list[tuple[bytes, bytes, Headers]]) -> None:
    """Send records with key, value and headers in one batch."""

    async def send_batch() -> None:
        producer = AIOKafkaProducer(bootstrap_servers=bootstrap)
        await producer.start()
        try:
            batch = producer.create_batch()
            for key, value, headers in records:
                batch.append(key=key, value=value, timestamp=None, headers=headers)
            batch.close()
            await (await producer.send_batch(batch, topic, partition=partition))
        finally:
            await producer.stop()

    with mock.patch.object(message_accumulator, "DefaultRecordBatchBuilder", RawNames):
        asyncio.run(send_batch())
