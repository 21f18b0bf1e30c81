"""Tests of the batches that the stream's consumer reads."""

from __future__ import annotations

import pytest
from aiokafka.consumer import fetcher
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBase
from raw_batches import NOT_UTF8, PLACEHOLDER, Headers, build_batch

from pipeline.consumer import create_app
from schemas.settings import Settings

PLAIN: Headers = [("name", b"1"), ("zähler", None)]
RECORDS = [(b"a", b"1", PLAIN), (b"b", b"2", [*PLAIN, (PLACEHOLDER, b"3")]), (b"c", b"4" * 900, PLAIN)]


def read(content: bytes) -> list[tuple[int, bytes | None, bytes | None, list[tuple[str, bytes | None]]]]:
    """Return offset, key, value and headers of every record, as aiokafka's fetcher reads them in the worker."""
    create_app(Settings())
    records = fetcher.MemoryRecords(content)
    found = []
    while records.has_next():
        batch = records.next_batch()
        assert batch.validate_crc()
        found += [(record.offset, record.key, record.value, list(record.headers)) for record in batch]
    return found


@pytest.mark.parametrize("compression", [DefaultRecordBase.CODEC_NONE, DefaultRecordBase.CODEC_GZIP])
def test_records_around_a_header_name_that_is_not_utf8_are_read_once(compression: int) -> None:
    escaped = NOT_UTF8.decode(errors="surrogateescape")
    expected = [
        (offset, key, value, [(name.replace(PLACEHOLDER, escaped), text) for name, text in headers])
        for offset, (key, value, headers) in enumerate(RECORDS)
    ]
    assert read(build_batch(RECORDS, compression) + build_batch(RECORDS[:1])) == [*expected, expected[0]]


def test_batch_without_such_names_is_read_as_before() -> None:
    assert read(build_batch(RECORDS[::2])) == [(0, *RECORDS[0]), (1, *RECORDS[2])]


def test_record_that_contradicts_its_own_length_is_an_error() -> None:
    content = bytearray(build_batch(RECORDS[:1]))
    content[61] ^= 2  # the length of the first record follows the header of the batch
    with pytest.raises(CorruptRecordException):
        list(fetcher.MemoryRecords(bytes(content)).next_batch())
