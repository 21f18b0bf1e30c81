"""Tests of the search for a record that ends every worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.crashes import MAX_CRASHES, CrashCounter
from pipeline.delta import DeltaLog, TableError
from pipeline.offsets import SourcePartition
from schemas.settings import Tables

SOURCE, OTHER = SourcePartition("traces", 0), SourcePartition("traces", 1)


@pytest.fixture
def tables(tmp_path: Path) -> DeltaLog:
    made = DeltaLog(Tables(uri=str(tmp_path)))
    made.create()
    return made


def run_worker(tables: DeltaLog, records: range, batch: int, poison: int) -> tuple[int, int | None]:
    """Handle records in batches, as the writer does; the process ends at the poison.

    Return the next offset, and the offset that became a dead letter unread.
    """
    counter, unread = CrashCounter(tables, careful_records=batch), None
    at = records.start
    while at < records.stop:
        crashes = counter.begin(SOURCE, at)
        size = 1 if counter.is_careful(SOURCE) else batch
        if crashes >= MAX_CRASHES:
            unread = at
        elif at <= poison < at + size:
            return at, None
        counter.pass_([SOURCE])
        at = min(at + size, records.stop)
    return at, unread


def test_record_that_ends_every_worker_is_found_in_the_middle_of_a_batch(tables: DeltaLog) -> None:
    next_offset, starts, unread = 0, 0, None
    while unread is None:
        starts += 1
        next_offset, unread = run_worker(tables, range(next_offset, 30), 10, poison=17)
        assert starts < 10
    assert (unread, next_offset) == (17, 30)
    assert starts == 3 + MAX_CRASHES, "two ends at the batch, then one more than at the record itself"


def test_batch_of_a_worker_that_was_killed_once_is_written_one_by_one_and_no_record_is_given_up(
    tables: DeltaLog,
) -> None:
    CrashCounter(tables, 3).begin(SOURCE, 5)
    counter = CrashCounter(tables, 3)
    crashes = []
    for offset in range(5, 8):
        crashes.append(counter.begin(SOURCE, offset))
        assert counter.is_careful(SOURCE)
        counter.pass_([SOURCE])
    assert not counter.is_careful(SOURCE)
    assert crashes == [1, 0, 0]
    assert counter.begin(SOURCE, 8) == 0


def test_only_the_first_write_of_a_worker_is_counted(tables: DeltaLog) -> None:
    first = CrashCounter(tables, 3)
    first.begin(SOURCE, 0)
    first.pass_([SOURCE])
    first.begin(SOURCE, 4)
    assert CrashCounter(tables, 3).begin(SOURCE, 4) == 0


def test_write_that_fails_is_no_crash(tables: DeltaLog) -> None:
    failing = CrashCounter(tables, 3)
    for _ in range(2 * MAX_CRASHES):
        assert failing.begin(SOURCE, 0) == 0
        failing.fail([SOURCE, OTHER])
    assert CrashCounter(tables, 3).begin(SOURCE, 0) == 0
    assert CrashCounter(tables, 3).begin(SOURCE, 0) == 1


def test_store_that_fails_is_a_table_error(tables: DeltaLog, tmp_path: Path) -> None:
    (tmp_path / "dead_letters" / "_attempts").write_text("a file where the folder should be")
    with pytest.raises(TableError, match=r"tables\.uri"):
        CrashCounter(tables, 3).begin(SOURCE, 0)
