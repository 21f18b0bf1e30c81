"""How long traffic waits for what it teaches: which version first holds a row, and by which clock."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from recorded import LINE, conversation, record_of, tables_of

from ops.bench.loop_served import Row, Served, Waits, elapsed, first_served, read_rows, read_served, waits
from ops.demo.record import Swap
from pipeline.delta import DeltaLog
from pipeline.offsets import SourcePartition, transaction_id
from schemas.settings import Settings, load
from trainer.data.data_loader import is_held_out
from trainer.release.registry import Version

RECORDED = 1_700_000_000
"""When every made-up verify step was committed."""


def test_a_row_is_served_by_the_first_version_whose_tables_hold_its_record() -> None:
    in_order = [Served("1", 10, {0: 4}), Served("2", 20, {0: 9, 1: 3}), Served("3", 30, {0: 20, 1: 8})]
    assert first_served(Row(0, 0, 4), in_order) == 10
    assert first_served(Row(0, 0, 5), in_order) == 20
    assert first_served(Row(0, 1, 0), in_order) == 20
    assert first_served(Row(0, 1, 9), in_order) is None
    assert first_served(Row(0, 2, 0), in_order) is None


def test_a_version_that_was_read_for_earlier_and_swapped_in_later_does_not_come_first() -> None:
    served = [Served("2", 20, {0: 9}), Served("1", 40, {0: 9})]
    found = waits([Row(5, 0, 9)], served, [(0, 100)], young_s=0)
    assert found == Waits((15,), unserved=0, young=0)


@pytest.mark.parametrize(("moment", "learned"), [(0, 0), (10, 0), (15, 5), (20, 10), (35, 10), (42, 12), (99, 20)])
def test_the_clock_stands_still_while_nothing_is_learned(moment: float, learned: float) -> None:
    assert elapsed([(10, 20), (40, 50)], moment) == learned


def test_a_wait_over_a_pause_leaves_the_pause_out() -> None:
    found = waits([Row(15, 0, 0)], [Served("1", 43, {0: 0})], [(10, 20), (40, 50)], young_s=0)
    assert found.seconds == (8,)


def test_a_row_that_is_never_served_waits_as_long_as_it_can_have() -> None:
    found = waits([Row(15, 0, 7)], [Served("1", 43, {0: 0})], [(10, 20), (40, 50)], young_s=0)
    assert found == Waits((15,), unserved=1, young=0)


def test_rows_of_the_end_do_not_count_however_quick_they_were() -> None:
    rows = [Row(10, 0, 0), Row(95, 0, 1)]
    found = waits(rows, [Served("1", 96, {0: 1})], [(0, 100)], young_s=20)
    assert found == Waits((86,), unserved=0, young=1)


def test_without_any_learning_nothing_waited() -> None:
    assert waits([], [], [], young_s=60) == Waits((), 0, 0)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of tables to which three records were added, one in each commit."""
    made = load(environ={}, flags={"tables.uri": str(tmp_path), "kafka.traces_topic": "traces"})
    tables = DeltaLog(made.tables)
    for offset in range(3):
        rows = tables_of(record_of(f"request-{offset}", conversation(range(9), 4), offset))
        for name in ("traces", "accepted"):
            tables.snapshot(name).append(rows[name], {transaction_id(name, SourcePartition("traces", 0)): offset})
    return made


def test_what_was_read_for_a_version_is_told_by_the_table_at_that_version(settings: Settings) -> None:
    registered = [
        Version(
            str(n),
            datetime.fromtimestamp(0, UTC),
            {"tables": json.dumps({"accepted": accepted, "rejected": 0})},
            card="",
            run="",
        )
        for n, accepted in enumerate([1, 3, 2])
    ]
    swaps = [Swap("1", 7.0, 0, 0.1), Swap("0", 3.0, 0, 0.1), Swap("1", 5.0, 0, 0.1)]
    assert read_served(settings, registered, swaps) == [Served("0", 3.0, {0: 0}), Served("1", 5.0, {0: 2})]


def test_rows_are_those_that_may_be_learned_from(settings: Settings) -> None:
    kept = [n for n in range(3) if not is_held_out(f"request-{n}", settings.train.held_out_ratio)]
    rows = read_rows(settings, LINE, RECORDED)
    assert sorted({row.offset for row in rows}) == kept
    assert {row.time for row in rows} == {RECORDED}
    assert not read_rows(settings, LINE, RECORDED + 1)
    assert not read_rows(settings, "another line", RECORDED)
