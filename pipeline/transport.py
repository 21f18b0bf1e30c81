"""What the stream changes in Faust's transport.

It reads committed records only, from offsets that the tables decide, and any header name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import aiokafka
import faust
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException, IllegalStateError
from aiokafka.record.default_records import DefaultRecordBatch, _DefaultRecordBatchPy
from aiokafka.record.memory_records import _MemoryRecordsPy
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Transport
from faust.types import TP

ReadStarts = Callable[[set[TP]], Awaitable[Mapping[TP, int]]]
"""Returns the offsets at which reading begins. Partitions without one begin at the group's offset."""


class _CommittedConsumerThread(AIOKafkaConsumerThread):  # type: ignore[misc]  # Faust has no types
    def _create_worker_consumer(self, transport: Transport) -> aiokafka.AIOKafkaConsumer:
        # Faust offers this only together with its own transactions, which the stream does not use.
        consumer = super()._create_worker_consumer(transport)
        consumer._isolation_level = "read_committed"
        return consumer


class _CommittedConsumer(Consumer):  # type: ignore[misc]
    def _new_consumer_thread(self) -> AIOKafkaConsumerThread:
        return _CommittedConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def seek_to_committed(self) -> Mapping[TP, int]:
        # Faust calls it after every assignment, before the first fetch.
        committed = await super().seek_to_committed()
        starts = await self.app.read_starts(self.assignment())
        starts = {tp: offset for tp, offset in starts.items() if tp in self.assignment()}
        if starts:
            with suppress(IllegalStateError):  # it was revoked meanwhile
                await self.seek_wait(starts)
        return {**committed, **starts}


class _CommittedTransport(Transport):  # type: ignore[misc]
    Consumer = _CommittedConsumer


class CommittedApp(faust.App):  # type: ignore[misc]
    """A Faust app that does not receive records of open and aborted transactions, and reads any header name.

    Header names that are not UTF-8 have a surrogate for each byte that is not. Set ``read_starts`` before it runs.
    """

    read_starts: ReadStarts

    def _new_transport(self) -> Transport:
        return _CommittedTransport(self.conf.broker_consumer, self)


class _EscapedBytes(bytearray):
    """Bytes whose slices are decoded with a surrogate for each byte that is not UTF-8."""

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        return _EscapedBytes(part) if isinstance(key, slice) else part

    def decode(self, encoding: str = "utf-8", errors: str = "surrogateescape") -> str:
        return super().decode(encoding, errors)


class _EscapedBatch(_DefaultRecordBatchPy):  # type: ignore[misc]  # final by declaration only
    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer = _EscapedBytes(self._buffer)  # type: ignore[has-type]


class _FetchedBatch:
    """A batch of records that is read again, slowly, if a header name is not UTF-8. aiokafka's reader ends there."""

    def __init__(self, batch: Any, content: memoryview) -> None:
        self._batch, self._content = batch, content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __iter__(self) -> Iterator[Any]:
        read = 0
        try:
            for record in self._batch:
                yield record
                read += 1
        except (UnicodeDecodeError, CorruptRecordException):
            for number, record in enumerate(_EscapedBatch(self._content)):
                if number >= read:
                    yield record


class _FetchedRecords(_MemoryRecordsPy):  # type: ignore[misc]  # final by declaration only
    """The batches of a fetch."""

    def next_batch(self) -> Any:
        content = self._next_slice
        batch = super().next_batch()
        has_headers = isinstance(batch, DefaultRecordBatch) and not batch.is_control_batch
        return _FetchedBatch(batch, content) if has_headers else batch


fetcher.MemoryRecords = _FetchedRecords
