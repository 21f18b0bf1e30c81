"""Tests of the dead-letter queue in real tables, and of the diagnosis of records."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import conversation, record_of

from pipeline.dead_letters.diagnosis import diagnose, hexdump
from pipeline.dead_letters.queue import (
    DeadLetterError,
    DeadLetterFilter,
    DeadLetterQueue,
    RecordAddress,
    parse_address,
    plan_replay,
)
from pipeline.delta import DeltaLog
from pipeline.offsets import LOST_TO_RETENTION
from schemas.batches import DEAD_LETTERS, REPLAYS, day_of
from schemas.settings import Settings, Tables

VALID = record_of("request", conversation(range(1, 12), prompt=4), offset=0)
HOUR_US = 3_600_000_000


def dead_letter_row(
    offset: int, reason: str, *, hour: int = 0, value: bytes | None = b"bytes", **changed: object
) -> dict[str, object]:
    """Return a row of ``dead_letters``."""
    return {
        "topic": "traces",
        "partition": 0,
        "offset": offset,
        "time": hour * HOUR_US,
        "day": day_of(hour * HOUR_US),
        "reason": reason,
        "detail": f"detail of {reason}",
        "rows": 2,
        "size": None if value is None else len(value),
        "key": b"request",
        "value": value,
        "headers": [{"name": "schema", "value": b"x"}, {"name": "note", "value": None}],
        **changed,
    }


def replay(offset: int, new_offset: int) -> dict[str, object]:
    at = {"topic": "traces", "partition": 0, "offset": offset}
    return {"time": HOUR_US, **at, "new_topic": "traces", "new_partition": 1, "new_offset": new_offset}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tables=Tables(uri=str(tmp_path)))


def write(
    settings: Settings, rows: list[dict[str, object]], replays: list[dict[str, object]] | None = None
) -> DeadLetterQueue:
    tables = DeltaLog(settings.tables)
    tables.append("dead_letters", pa.Table.from_pylist(rows, schema=DEAD_LETTERS))
    if replays:
        tables.append("replays", pa.Table.from_pylist(replays, schema=REPLAYS))
    return DeadLetterQueue(tables, settings.kafka)


def offsets(queue: DeadLetterQueue, wanted: DeadLetterFilter) -> list[int]:
    return [one.address.offset for one in queue.find(wanted)]


def test_find_filters_by_reason_time_and_address_and_returns_the_newest_first(settings: Settings) -> None:
    queue = write(settings, [dead_letter_row(n, "corrupt" if n % 2 else "empty", hour=n) for n in range(6)])
    assert offsets(queue, DeadLetterFilter()) == [5, 4, 3, 2, 1, 0]
    assert offsets(queue, DeadLetterFilter(limit=2)) == [5, 4]
    assert offsets(queue, DeadLetterFilter(reason="corrupt")) == [5, 3, 1]
    assert offsets(queue, DeadLetterFilter(since=datetime(1970, 1, 1, 4, tzinfo=UTC))) == [5, 4]
    assert offsets(queue, DeadLetterFilter((RecordAddress("traces", 0, 3), RecordAddress("traces", 0, 1)))) == [3, 1]
    assert offsets(queue, DeadLetterFilter(reason="it's none")) == []


def test_missing_dead_letter_is_named(settings: Settings) -> None:
    queue = write(settings, [dead_letter_row(1, "corrupt")])
    with pytest.raises(DeadLetterError, match="traces/0/2"):
        queue.find(DeadLetterFilter((RecordAddress("traces", 0, 1), RecordAddress("traces", 0, 2))))


def test_content_has_key_value_and_headers_of_the_record(settings: Settings) -> None:
    address = RecordAddress("traces", 0, 1)
    content = write(settings, [dead_letter_row(1, "corrupt", value=b"\x00\xff", key=None)]).read_contents([address])[
        address
    ]
    assert (content.key, content.value) == (None, b"\x00\xff")
    assert content.headers == (("schema", b"x"), ("note", None))
    assert content.replay_of is None


def test_dead_letter_lists_its_replays_and_its_origin(settings: Settings) -> None:
    again = dead_letter_row(9, "claim_missing", partition=1, headers=[{"name": "replay-of", "value": b"traces/0/1"}])
    rows = [
        dead_letter_row(1, "claim_missing"),
        dead_letter_row(2, "claim_missing"),
        dead_letter_row(3, "claim_missing"),
        again,
    ]
    queue = write(settings, rows, [replay(1, new_offset=9), replay(2, new_offset=10)])
    failed, accepted, never = (queue.find(DeadLetterFilter((RecordAddress("traces", 0, n),)))[0] for n in (1, 2, 3))
    assert [(r.new_address, r.reason) for r in failed.replays] == [(RecordAddress("traces", 1, 9), "claim_missing")]
    assert [(r.new_address, r.reason) for r in accepted.replays] == [(RecordAddress("traces", 1, 10), None)]
    assert never.replays == ()
    address = RecordAddress("traces", 1, 9)
    assert queue.read_contents([address])[address].replay_of == "traces/0/1"


def test_replay_plan_excludes_replayed_and_permanent_dead_letters(settings: Settings) -> None:
    rows = [
        dead_letter_row(1, "claim_missing"),
        dead_letter_row(2, "claim_missing"),
        dead_letter_row(3, "duplicate"),
        dead_letter_row(4, LOST_TO_RETENTION, value=None, key=None, headers=None),
        dead_letter_row(5, "empty", value=None),
    ]
    found = write(settings, rows, [replay(1, new_offset=9)]).find(DeadLetterFilter())

    def chosen(*, named: bool, again: bool) -> list[int]:
        return [one.address.offset for one in plan_replay(found, named=named, again=again).dead_letters]

    assert chosen(named=False, again=False) == [2]
    assert chosen(named=True, again=False) == [2, 3]
    assert chosen(named=False, again=True) == [1, 2]
    left_out = plan_replay(found, named=False, again=False).excluded
    assert sum(left_out.values()) == 4
    assert "lost to retention before they were read, so there is nothing to publish" in left_out


def test_loss_does_not_hide_a_dead_letter_at_its_offset(settings: Settings) -> None:
    queue = write(
        settings,
        [
            dead_letter_row(1, "claim_missing"),
            dead_letter_row(1, LOST_TO_RETENTION, value=None, key=None, headers=None),
        ],
    )
    address = RecordAddress("traces", 0, 1)
    assert queue.read_contents([address])[address].value == b"bytes"
    assert [
        one.reason for one in plan_replay(queue.find(DeadLetterFilter()), named=True, again=False).dead_letters
    ] == ["claim_missing"]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("3/17", RecordAddress("traces", 3, 17)),
        ("other/3/17", RecordAddress("other", 3, 17)),
        ("a/b/3/17", RecordAddress("a/b", 3, 17)),
    ],
)
def test_topic_of_an_address_is_optional(text: str, address: RecordAddress) -> None:
    assert parse_address(text, "traces") == address
    assert parse_address(str(address), "traces") == address


@pytest.mark.parametrize("text", ["", "17", "a/17", "1/-1", "/1/2x"])
def test_invalid_address_is_an_error(text: str) -> None:
    with pytest.raises(DeadLetterError, match="TOPIC/PARTITION/OFFSET"):
        parse_address(text, "traces")


def valid_value() -> bytes:
    assert VALID.value is not None
    return VALID.value


def test_diagnosis_of_a_valid_record_reads_every_layer() -> None:
    layers = diagnose(valid_value())
    assert layers["checksum"] == "matches"
    assert "request request" in layers["envelope"]
    assert "line target-draft" in layers["envelope"]
    assert layers["verify_steps"].endswith("verify steps 0 to 3, 10 tokens")


def test_diagnosis_of_a_truncated_record_reads_the_envelope() -> None:
    layers = diagnose(valid_value()[:-500])
    assert layers["checksum"].startswith("does not match")
    assert "request request" in layers["envelope"]


def test_diagnosis_reports_a_column_whose_name_is_not_text() -> None:
    value = valid_value()
    at = value.index(b"accepted")
    layers = diagnose(value[:at] + b"\x80" + value[at + 1 :])
    assert layers["columns"] == "missing or of another type: accepted"


@given(st.data())
def test_diagnosis_never_fails_on_altered_bytes(data: st.DataObject) -> None:
    value = bytearray(valid_value())
    for place in data.draw(st.lists(st.integers(0, len(value) - 1), max_size=8)):
        value[place] = data.draw(st.integers(0, 255))
    diagnose(bytes(value[: data.draw(st.integers(0, len(value)))]))


@given(st.binary(max_size=64))
def test_diagnosis_of_foreign_bytes_reports_the_checksum(value: bytes) -> None:
    assert diagnose(value)["checksum"].startswith("does not match")


def test_hexdump_ends_at_its_limit() -> None:
    assert list(hexdump(b"Aurora\x00\xff" * 3, 18)) == [
        "00000000  4175 726f 7261 00ff 4175 726f 7261 00ff   Aurora..Aurora..",
        "00000010  4175                                      Au",
    ]
