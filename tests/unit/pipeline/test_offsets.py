"""Tests of the exactly-once protocol: its decisions, and a model with crashes, rebalances and fencing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, Schema
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from memory_tables import Crash, MemoryTables, crash_after, nothing

from pipeline import delta
from pipeline.delta import DeltaLog, TableError
from pipeline.offsets import (
    COMMIT_ORDER,
    HOLE,
    LOST_TO_RETENTION,
    SKIPPED,
    Batch,
    ConflictError,
    FencedError,
    ForeignLogError,
    OffsetCommitter,
    SourcePartition,
    find_gaps,
    find_lost_offsets,
    select_records,
    transaction_id,
)
from schemas.batches import TABLES
from schemas.settings import Tables

SOURCE, OTHER = SOURCES = SourcePartition("traces", 0), SourcePartition("traces", 1)


def rows(name: str, offsets: range, source: SourcePartition = SOURCE) -> pa.Table:
    """Return one row per offset. Columns that the protocol does not read are null."""
    schema = TABLES[name]
    columns = {"topic": source.topic, "partition": source.partition}
    arrays = [
        pa.array(offsets if f.name == "offset" else [columns.get(f.name)] * len(offsets), type=f.type) for f in schema
    ]
    return pa.table(arrays, schema=schema)


def batch(offsets: range, source: SourcePartition = SOURCE, names: Sequence[str] = COMMIT_ORDER) -> Batch:
    """Return a batch with a row per offset in the tables of ``names``."""
    no = range(0)
    return Batch(
        source, offsets[-1], {name: rows(name, offsets if name in names else no, source) for name in COMMIT_ORDER}
    )


def test_records_are_skipped_selected_or_deferred_by_the_next_offset() -> None:
    assert select_records(5, [3, 4, 5, 6, 8, 9]).selected == (2, 3)
    assert select_records(5, [3, 4, 5, 6, 8, 9]).skipped == 2
    assert select_records(5, [3, 4, 5, 6, 8, 9]).deferred == 2
    assert select_records(5, [3, 4, 5, 6, 8, 9]).has_gap


def test_gap_filled_by_the_same_delivery_needs_no_seek() -> None:
    selection = select_records(5, [7, 8, 5, 6, 7])
    assert selection.selected == (2, 3, 4)
    assert selection.deferred == 2
    assert not selection.has_gap


@given(st.integers(0, 20), st.lists(st.integers(0, 30)))
def test_selected_records_are_contiguous_and_every_record_is_counted(next_offset: int, offsets: list[int]) -> None:
    selection = select_records(next_offset, offsets)
    selected = [offsets[i] for i in selection.selected]
    assert selected == list(range(next_offset, next_offset + len(selected)))
    assert len(selected) + selection.skipped + selection.deferred == len(offsets)


@given(
    st.integers(0, 20),
    st.lists(st.booleans(), min_size=1, max_size=30),
    st.lists(st.integers(0, 30)),
)
def test_all_records_around_holes_are_selected_once_the_holes_are_confirmed(
    start: int, has_record: list[bool], behind: list[int]
) -> None:
    """The log from ``start`` on, of which some offsets have no record; ``behind`` is delivered once more."""
    records = [start + i for i, there in enumerate(has_record) if there]
    gaps = find_gaps(start, [*records, *behind])
    assert [offset for gap in find_gaps(start, records) for offset in gap] == [
        offset for offset in range(start, max(records, default=start)) if offset not in records
    ]
    selection = select_records(start, records, find_gaps(start, records))
    assert [records[i] for i in selection.selected] == records
    assert not selection.has_gap
    assert list(selection.holes) == find_gaps(start, records)
    assert all(set(records).isdisjoint(gap) for gap in gaps)


def test_gap_that_is_a_hole_in_part_only_is_passed_up_to_the_record_that_is_missing() -> None:
    selection = select_records(5, [5, 9], [range(6, 8)])
    assert (selection.selected, selection.holes, selection.deferred, selection.has_gap) == ((0,), (), 1, True)
    selection = select_records(5, [5, 9], [range(6, 9)])
    assert (selection.selected, selection.holes, selection.has_gap) == ((0, 1), (range(6, 9),), False)


def test_record_in_a_confirmed_hole_is_selected() -> None:
    assert select_records(5, [6], [range(5, 8)]).selected == (0,)


def test_hole_is_recorded_once_although_a_crash_left_tables_behind() -> None:
    tables = MemoryTables()
    none = {name: TABLES[name].empty_table() for name in COMMIT_ORDER}
    first = Batch(SOURCE, 4, {**none, "traces": rows("traces", range(2))}, (range(2, 5),))
    tables.before_append = crash_after(1)
    with pytest.raises(Crash):
        OffsetCommitter(tables).commit([first])
    tables.before_append = nothing
    assert OffsetCommitter(tables).next_offset(SOURCE) == 0
    longer = Batch(SOURCE, 8, {**none, "traces": rows("traces", range(2))}, (range(2, 6), range(7, 9)))
    OffsetCommitter(tables).commit([longer])
    assert tables.tables["dead_letters"].never_read(HOLE) == [2, 3, 4, 5, 7, 8]
    assert OffsetCommitter(tables).next_offset(SOURCE) == 9


def test_skipped_offset_is_recorded_with_its_reason_and_fences_the_worker_that_waits_for_it() -> None:
    tables = MemoryTables()
    waiting, person = OffsetCommitter(tables), OffsetCommitter(tables)
    waiting.commit([batch(range(3))])
    person.record_loss(SOURCE, range(3, 4), 0, SKIPPED, "skipped by ann: it is broken")
    assert tables.tables["dead_letters"].never_read(SKIPPED) == [3]
    with pytest.raises(FencedError):
        waiting.commit([batch(range(3, 5))])
    assert waiting.next_offset(SOURCE) == 4


def test_records_between_next_offset_and_log_start_are_lost() -> None:
    assert find_lost_offsets(SOURCE, 5, 9, 20) == range(5, 9)
    assert not find_lost_offsets(SOURCE, 5, 0, 20)
    assert not find_lost_offsets(SOURCE, 20, 0, 20)


def test_log_that_ends_before_the_next_offset_is_rejected() -> None:
    with pytest.raises(ForeignLogError, match="aurora stream new-log"):
        find_lost_offsets(SOURCE, 5, 0, 4)


def test_crash_between_two_tables_is_repaired_without_duplicates() -> None:
    tables = MemoryTables()
    tables.before_append = crash_after(2)
    with pytest.raises(Crash):
        OffsetCommitter(tables).commit([batch(range(4))])
    tables.before_append = nothing
    assert [tables.offsets(name) for name in COMMIT_ORDER] == [[0, 1, 2, 3], [0, 1, 2, 3], [], []]

    restarted = OffsetCommitter(tables)
    assert restarted.next_offset(SOURCE) == 0
    restarted.commit([batch(range(6))])
    assert all(tables.offsets(name) == [0, 1, 2, 3, 4, 5] for name in COMMIT_ORDER)
    assert restarted.next_offset(SOURCE) == 6


def test_last_table_is_written_after_all_others() -> None:
    tables = MemoryTables()
    tables.before_append = crash_in({1})
    with pytest.raises(Crash):
        OffsetCommitter(tables, SynchronousPool()).commit([batch(range(4))])
    tables.before_append = nothing
    assert [tables.offsets(name) for name in COMMIT_ORDER] == [[0, 1, 2, 3], [], [0, 1, 2, 3], []]

    restarted = OffsetCommitter(tables, SynchronousPool())
    restarted.commit([batch(range(restarted.next_offset(SOURCE), 6))])
    assert all(tables.offsets(name) == [0, 1, 2, 3, 4, 5] for name in COMMIT_ORDER)


def test_tables_are_written_by_several_threads(tmp_path: Path) -> None:
    log = DeltaLog(Tables(uri=str(tmp_path)))
    with ThreadPoolExecutor(3) as pool:
        committer = OffsetCommitter(log, pool)
        for start in range(0, 12, 3):
            committer.commit([dead_letters(range(start, start + 3))])
    assert sorted(log.read("dead_letters", ["offset"])["offset"].to_pylist()) == list(range(12))
    assert OffsetCommitter(log).next_offset(SOURCE) == 12
    assert {name: log.version(name) for name in COMMIT_ORDER} == {
        "dead_letters": 4, "rejected": 0, "traces": 0, "accepted": 4,
    }  # fmt: skip


def test_stale_owner_is_fenced_and_reads_the_next_offset_again() -> None:
    tables = MemoryTables()
    stale, owner = OffsetCommitter(tables), OffsetCommitter(tables)
    assert stale.next_offset(SOURCE) == 0
    owner.commit([batch(range(3))])
    with pytest.raises(FencedError, match="another worker"):
        stale.commit([batch(range(2))])
    assert stale.next_offset(SOURCE) == 3
    assert tables.offsets("traces") == [0, 1, 2]


def test_writer_of_another_partition_delays_a_commit_but_does_not_fence_it() -> None:
    tables = MemoryTables()

    def interfere() -> None:
        tables.before_append = nothing
        OffsetCommitter(tables).commit([batch(range(2), OTHER)])

    tables.before_append = interfere
    OffsetCommitter(tables).commit([batch(range(3))])
    assert sorted(tables.tables["traces"].rows) == [(0, 0, ""), (0, 1, ""), (0, 2, ""), (1, 0, ""), (1, 1, "")]


def test_commit_of_another_partition_does_not_hide_a_new_owner() -> None:
    tables = MemoryTables()
    stale = OffsetCommitter(tables)
    stale.commit([batch(range(2)), batch(range(2), OTHER)])
    OffsetCommitter(tables).commit([batch(range(2, 4), OTHER)])
    stale.commit([batch(range(2, 4))])
    with pytest.raises(FencedError):
        stale.commit([batch(range(2, 5), OTHER)])
    assert tables.offsets("traces", OTHER.partition) == [0, 1, 2, 3]


def test_tables_without_rows_are_not_committed() -> None:
    tables = MemoryTables()
    committer = OffsetCommitter(tables)
    assert committer.commit([batch(range(3), names=["traces"]), batch(range(3), OTHER, ["rejected"])]) == (
        "rejected", "traces", "accepted",
    )  # fmt: skip
    assert committer.commit([batch(range(3, 5), names=[])]) == ("accepted",)
    assert {name: len(tables.tables[name].log) for name in COMMIT_ORDER} == {
        "dead_letters": 0, "rejected": 1, "traces": 1, "accepted": 2,
    }  # fmt: skip
    assert OffsetCommitter(tables).next_offset(SOURCE) == 5
    committer.commit([batch(range(5, 6))])
    assert tables.offsets("traces") == [0, 1, 2, 5]


def test_table_that_lags_gets_no_row_twice_after_a_crash() -> None:
    tables = MemoryTables()
    OffsetCommitter(tables).commit([batch(range(9), names=["accepted"])])
    tables.before_append = crash_after(1)
    with pytest.raises(Crash):
        OffsetCommitter(tables).commit([batch(range(9, 12), names=["rejected", "traces"])])
    tables.before_append = nothing
    restarted = OffsetCommitter(tables)
    assert restarted.next_offset(SOURCE) == 9
    restarted.commit([batch(range(9, 14), names=["rejected", "traces"])])
    assert tables.offsets("rejected") == tables.offsets("traces") == [9, 10, 11, 12, 13]


def test_commit_is_made_on_a_new_snapshot_after_another_process_added_a_column() -> None:
    tables = MemoryTables()
    committer = OffsetCommitter(tables)
    committer.commit([batch(range(2))])
    tables.tables["traces"].change_columns()
    committer.commit([batch(range(2, 4))])
    assert tables.offsets("traces") == [0, 1, 2, 3]


def test_owner_that_writes_between_check_and_append_wins() -> None:
    tables = MemoryTables()

    def interfere() -> None:
        tables.before_append = nothing
        OffsetCommitter(tables).commit([batch(range(3))])

    tables.before_append = interfere
    with pytest.raises(FencedError):
        OffsetCommitter(tables).commit([batch(range(3))])
    assert all(tables.offsets(name) == [0, 1, 2] for name in COMMIT_ORDER)


def test_loss_is_recorded_once_despite_a_crash() -> None:
    tables = MemoryTables()
    tables.before_append = crash_after(1)
    with pytest.raises(Crash):
        OffsetCommitter(tables).record_loss(SOURCE, range(10), 0)
    tables.before_append = nothing
    restarted = OffsetCommitter(tables)
    restarted.record_loss(SOURCE, range(restarted.next_offset(SOURCE), 10), 0)
    assert tables.tables["dead_letters"].rows == [(0, 0, LOST_TO_RETENTION)]
    assert restarted.next_offset(SOURCE) == 10


def test_delta_fences_a_stale_owner(tmp_path: Path) -> None:
    settings = Tables(uri=str(tmp_path))
    stale, owner = OffsetCommitter(DeltaLog(settings)), OffsetCommitter(DeltaLog(settings))
    stale.commit([dead_letters(range(2))])
    assert owner.next_offset(SOURCE) == 2
    owner.commit([dead_letters(range(2, 4))])
    with pytest.raises(FencedError):
        stale.commit([dead_letters(range(2, 5))])
    assert stale.next_offset(SOURCE) == 4
    assert sorted(DeltaLog(settings).read("dead_letters", ["offset"])["offset"].to_pylist()) == [0, 1, 2, 3]


MINE, THEIRS = (transaction_id("dead_letters", source) for source in SOURCES)


class Fenced:
    """A handle on ``dead_letters`` that has set ``MINE``, and a second process that writes meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "dead_letters"
        self.rows = dead_letters(range(1)).rows["dead_letters"]
        self.log = DeltaLog(Tables(uri=str(folder)))
        self.other = DeltaLog(Tables(uri=str(folder)))
        self.stale = self.log.snapshot("dead_letters")
        self.stale.append(self.rows, {MINE: 1})

    def write(self, *transactions: str) -> None:
        for app_id in transactions:
            self.other.snapshot("dead_letters").append(self.rows, {app_id: 7})

    def checkpoint(self) -> None:
        DeltaTable(str(self.folder)).create_checkpoint()

    def clean(self) -> None:
        """Delete all commits that the newest checkpoint contains."""
        for commit in (self.folder / "_delta_log").glob("*.json"):
            os.utime(commit, (1, 1))
        DeltaTable(str(self.folder)).cleanup_metadata()

    def log_entries(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "_delta_log").glob("*.json"))


@pytest.fixture
def fenced(tmp_path: Path) -> Fenced:
    return Fenced(tmp_path)


@pytest.mark.parametrize("behind", [0, 1, 6])
def test_delta_fences_a_transaction_that_a_later_commit_has_set(fenced: Fenced, behind: int) -> None:
    fenced.write(MINE, *[THEIRS] * behind)
    with pytest.raises(FencedError):
        fenced.stale.append(fenced.rows, {MINE: 2})
    assert fenced.log.row_count("dead_letters") == 2 + behind
    assert fenced.log.snapshot("dead_letters").transaction(MINE) == 7


def test_delta_fences_across_a_checkpoint(fenced: Fenced) -> None:
    fenced.write(MINE, THEIRS)
    fenced.checkpoint()
    fenced.write(THEIRS)
    with pytest.raises(FencedError):
        fenced.stale.append(fenced.rows, {MINE: 2})
    fenced.log.snapshot("dead_letters").append(fenced.rows, {MINE: 8})


@pytest.mark.parametrize("set_meanwhile", [MINE, THEIRS])
def test_delta_adds_nothing_through_a_handle_whose_log_was_cleaned(fenced: Fenced, set_meanwhile: str) -> None:
    fenced.write(set_meanwhile, THEIRS)
    fenced.checkpoint()
    fenced.clean()
    entries = fenced.log_entries()
    with pytest.raises(TableError):
        fenced.stale.append(fenced.rows, {MINE: 2})
    assert fenced.log_entries() == entries
    assert fenced.log.row_count("dead_letters") == 3
    again = fenced.log.snapshot("dead_letters")
    assert again.transaction(MINE) == (7 if set_meanwhile == MINE else 1)
    again.append(fenced.rows, {MINE: 8})
    assert fenced.log.row_count("dead_letters") == 4


def test_handle_that_is_put_behind_commits_of_others_knows_their_transactions(fenced: Fenced) -> None:
    assert fenced.stale.transaction(THEIRS) is None
    fenced.write(THEIRS)
    fenced.stale.append(fenced.rows, {MINE: 2})
    assert (fenced.stale.version, fenced.stale.transaction(THEIRS), fenced.stale.transaction(MINE)) == (3, 7, 2)


def test_handle_reads_its_transactions_again_if_a_commit_of_others_is_gone(fenced: Fenced) -> None:
    assert fenced.stale.transaction(THEIRS) is None
    fenced.write(THEIRS, THEIRS)
    fenced.checkpoint()
    fenced.clean()
    fenced.stale.refresh()
    assert (fenced.stale.transaction(THEIRS), fenced.stale.transaction(MINE)) == (7, 1)


def test_handle_is_opened_anew_after_many_appends_and_keeps_its_transactions(
    fenced: Fenced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "REOPEN_AFTER", 3)
    first = fenced.stale.table
    assert fenced.stale.transaction(THEIRS) is None
    fenced.write(THEIRS)
    for version in (2, 3):
        fenced.stale.append(fenced.rows, {MINE: version})
    assert fenced.stale.table is not first
    assert (fenced.stale.transaction(THEIRS), fenced.stale.transaction(MINE)) == (7, 3)


def test_commit_through_an_old_handle_writes_its_file_once(fenced: Fenced) -> None:
    fenced.write(*[THEIRS] * 3)
    fenced.stale.append(fenced.rows, {MINE: 2})
    assert len(list(fenced.folder.rglob("*.parquet"))) == fenced.log.row_count("dead_letters") == 5


def test_commit_without_retries_directly_follows_its_snapshot(fenced: Fenced) -> None:
    fenced.write(THEIRS)
    with pytest.raises(ConflictError):
        fenced.stale.append(fenced.rows, {}, retries=0)
    assert fenced.log.row_count("dead_letters") == 2


def test_column_added_by_another_process_is_a_conflict_and_no_fence(fenced: Fenced) -> None:
    column = Schema.from_arrow(pa.schema([pa.field("newer", pa.string())])).fields
    DeltaTable(str(fenced.folder)).alter.add_columns(column)
    with pytest.raises(ConflictError):
        fenced.stale.append(fenced.rows, {MINE: 2})
    fenced.log.snapshot("dead_letters").append(fenced.rows, {MINE: 2})
    assert fenced.log.row_count("dead_letters") == 2


def test_owners_of_several_partitions_write_at_the_same_time_without_loss_or_duplicates(tmp_path: Path) -> None:
    """Two owners of each partition: of two that write the same records, one is fenced."""
    DeltaLog(Tables(uri=str(tmp_path))).create()
    fences = count()

    def own(source: SourcePartition) -> None:
        committer = OffsetCommitter(DeltaLog(Tables(uri=str(tmp_path))))
        while (start := committer.next_offset(source)) < 12:
            try:
                committer.commit([dead_letters(range(start, start + 3), source)])
            except FencedError:
                next(fences)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(own, source) for source in SOURCES * 2]:
            done.result()
    rows = DeltaLog(Tables(uri=str(tmp_path))).read("dead_letters", ["partition", "offset"]).to_pylist()
    assert sorted((row["partition"], row["offset"]) for row in rows) == [(p, o) for p in (0, 1) for o in range(12)]
    assert next(fences) > 0


def test_added_rows_are_read_in_the_order_of_their_commits(tmp_path: Path) -> None:
    log = DeltaLog(Tables(uri=str(tmp_path)))
    committer = OffsetCommitter(log)
    for start in range(0, 60, 3):
        committer.commit([dead_letters(range(start, start + 3))])
    newest = log.version("dead_letters")
    assert log.read_added("dead_letters", 0, newest)["offset"].to_pylist() == list(range(60))
    assert log.read_added("dead_letters", newest - 2, newest)["offset"].to_pylist() == list(range(54, 60))
    assert log.read_added("dead_letters", newest, newest).num_rows == 0
    assert log.read_added("dead_letters", 0, newest).schema == TABLES["dead_letters"]
    assert log.row_count("dead_letters") == 60


def crash_in(steps: set[int]) -> Callable[[], None]:
    """Return a step that crashes at these calls, counted from 0. Concurrent calls may still succeed."""
    numbers = count()

    def step() -> None:
        if next(numbers) in steps:
            raise Crash

    return step


def dead_letters(offsets: range, source: SourcePartition = SOURCE) -> Batch:
    """Return a batch of dead letters that is valid for a real table."""
    row = {**source._asdict(), "time": 0, "day": 0, "reason": "r", "detail": "d"}
    empty = dict.fromkeys(TABLES["dead_letters"].names)
    letters = pa.Table.from_pylist([{**empty, **row, "offset": o} for o in offsets], schema=TABLES["dead_letters"])
    none = {name: TABLES[name].empty_table() for name in COMMIT_ORDER}
    return Batch(source, offsets[-1], {**none, "dead_letters": letters})


class SynchronousPool(Executor):
    """A pool on one thread. A failed write does not stop the others, as in a real pool."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - a crash is raised to the waiting caller, too
            future.set_exception(error)
        return future


def hole_at(first: int, end: int, markers: set[int]) -> range:
    """Return the hole that begins at an offset, as a second consumer sees it; empty at a record."""
    return range(first, next((offset for offset in range(first, end) if offset not in markers), end))


def batch_of(source: SourcePartition, offsets: list[int], holes: tuple[range, ...]) -> Batch:
    """Return a batch of records with holes between or behind them. Some records have no rows in some tables."""
    last = max([*offsets, *(hole.stop - 1 for hole in holes)])
    made = {
        name: pa.concat_tables(
            [TABLES[name].empty_table(), *(rows(name, range(o, o + 1), source) for o in offsets if has_rows(name, o))]
        )
        for name in COMMIT_ORDER
    }
    return Batch(source, last, made, holes)


def has_rows(name: str, offset: int) -> bool:
    """Return whether a record has rows in a table: each fifth is a dead letter, others may have no rejected branch."""
    if offset % 5 == 3:
        return name == "dead_letters"
    return name in {"traces", "accepted"} or (name == "rejected" and offset % 2 == 0)


@dataclass
class Log:
    """A partition on the broker."""

    start: int = 0
    end: int = 0
    """The offset after its last one."""
    markers: set[int] = field(default_factory=set)
    """Offsets at which no consumer receives a record."""


class Worker:
    """A worker that behaves like ``pipeline.worker``, with a consumer at any position of each partition."""

    def __init__(self, tables: MemoryTables) -> None:
        self.committer = OffsetCommitter(tables, SynchronousPool())
        self.positions = dict.fromkeys(SOURCES, 0)

    def deliver(self, logs: Mapping[SourcePartition, Log], count: int) -> None:
        """Write delivered records and pass holes in one commit. After another gap seek to the next offset.

        Args:
            logs: The partitions that are read.
            count: Offsets that the consumer moves in each.
        """
        read = {source: self.read(source, log, count) for source, log in logs.items()}
        if batches := [one for one, _ in read.values() if one]:
            self.committer.commit(batches)
        for source, (_, has_gap) in read.items():
            if has_gap:
                self.positions[source] = self.committer.next_offset(source)

    def read(self, source: SourcePartition, log: Log, count: int) -> tuple[Batch | None, bool]:
        """Return the next batch of a partition, and whether the consumer must seek back."""
        passed = range(max(self.positions[source], log.start), min(self.positions[source] + count, log.end))
        offsets = [offset for offset in passed if offset not in log.markers]
        self.positions[source] += len(passed)
        next_offset = self.committer.next_offset(source)
        lost = find_lost_offsets(source, next_offset, log.start, log.end)
        if lost:
            self.committer.record_loss(source, lost, 0)
            next_offset = self.committer.next_offset(source)
        gaps = find_gaps(next_offset, offsets)
        holes = [hole for gap in gaps if (hole := hole_at(gap.start, gap.stop, log.markers))]
        selection = select_records(next_offset, offsets, holes)
        if selection.selected:
            made = batch_of(source, [offsets[i] for i in selection.selected], selection.holes)
        elif hole := hole_at(next_offset, log.end, log.markers):
            made = batch_of(source, [], (hole,))
        else:
            return None, selection.has_gap
        return made, selection.has_gap


class ExactlyOnce(RuleBasedStateMachine):
    """Two workers believe that they own both partitions, and write one of them or both in a commit. Consumers jump,
    workers crash between two commits or are overtaken during one, other processes add columns, the broker deletes old
    records, and transactions leave holes. The tables contain every other record once, and every hole is recorded as
    one."""

    workers = st.integers(0, 1)
    some = st.sampled_from([(SOURCE,), (OTHER,), (SOURCE, OTHER)])

    @initialize()
    def begin(self) -> None:
        self.tables = MemoryTables()
        self.pair = [Worker(self.tables), Worker(self.tables)]
        self.logs = {source: Log() for source in SOURCES}

    @rule(sources=some, count=st.integers(1, 8))
    def publish(self, sources: Sequence[SourcePartition], count: int) -> None:
        for source in sources:
            self.logs[source].end += count

    @rule(source=st.sampled_from(SOURCES), count=st.integers(1, 3))
    def transaction_ends(self, source: SourcePartition, count: int) -> None:
        log = self.logs[source]
        log.markers.update(range(log.end, log.end + count))
        log.end += count

    @rule(who=workers, sources=some, count=st.integers(1, 6))
    def deliver(self, who: int, sources: Sequence[SourcePartition], count: int) -> None:
        worker = self.pair[who]
        try:
            worker.deliver({source: self.logs[source] for source in sources}, count)
        except FencedError:
            for source in sources:
                worker.positions[source] = worker.committer.next_offset(source)

    @rule(who=workers, source=st.sampled_from(SOURCES), to=st.integers(0, 40))
    def consumer_jumps(self, who: int, source: SourcePartition, to: int) -> None:
        self.pair[who].positions[source] = min(to, self.logs[source].end)

    @rule(who=workers, sources=some)
    def partition_assigned(self, who: int, sources: Sequence[SourcePartition]) -> None:
        self.pair[who].committer.invalidate(sources)

    @rule(name=st.sampled_from(COMMIT_ORDER))
    def another_process_adds_a_column(self, name: str) -> None:
        self.tables.tables[name].change_columns()

    @rule(who=workers, sources=some, unwritten=st.sets(st.integers(0, 3), min_size=1), count=st.integers(1, 6))
    def dies_between_commits(
        self, who: int, sources: Sequence[SourcePartition], unwritten: set[int], count: int
    ) -> None:
        self.tables.before_append = crash_in(unwritten)
        try:
            self.deliver(who, sources, count)
        except Crash:
            positions = self.pair[who].positions
            self.pair[who] = Worker(self.tables)
            self.pair[who].positions = positions
        finally:
            self.tables.before_append = nothing

    @rule(who=workers, commits=st.integers(0, 3), mine=some, theirs=some, count=st.integers(1, 6))
    def overtaken_in_a_commit(
        self,
        who: int,
        commits: int,
        mine: Sequence[SourcePartition],
        theirs: Sequence[SourcePartition],
        count: int,
    ) -> None:
        left = commits

        def overtake() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                self.tables.before_append = nothing
                self.deliver(1 - who, theirs, count)

        self.tables.before_append = overtake
        try:
            self.deliver(who, mine, count)
        finally:
            self.tables.before_append = nothing

    @rule(source=st.sampled_from(SOURCES), share=st.floats(0, 1))
    def broker_deletes(self, source: SourcePartition, share: float) -> None:
        log = self.logs[source]
        log.start += int((log.end - log.start) * share)

    @invariant()
    def nothing_is_doubled_or_out_of_order(self) -> None:
        for name in COMMIT_ORDER:
            for source in SOURCES:
                offsets = self.tables.offsets(name, source.partition)
                assert offsets == sorted(set(offsets))

    @invariant()
    def other_tables_contain_what_accepted_contains(self) -> None:
        for source in SOURCES:
            never_read = self.never_read(source)
            contained = range(OffsetCommitter(self.tables).next_offset(source))
            for name in COMMIT_ORDER:
                kept = self.tables.offsets(name, source.partition)
                assert all(o in kept for o in contained if has_rows(name, o) and o not in never_read)

    def never_read(self, source: SourcePartition) -> set[int]:
        letters = self.tables.tables["dead_letters"]
        return {o for reason in (LOST_TO_RETENTION, HOLE) for o in letters.never_read(reason, source.partition)}

    def teardown(self) -> None:
        """Let one worker finish: every record is in the tables, or recorded as lost, and every hole as a hole."""
        worker = Worker(self.tables)
        for _ in range(3):
            worker.deliver(self.logs, max(log.end for log in self.logs.values()) + 1)
        for source, log in self.logs.items():
            self.check_all(source, log)

    def check_all(self, source: SourcePartition, log: Log) -> None:
        letters = self.tables.tables["dead_letters"]
        lost, holes = (letters.never_read(reason, source.partition) for reason in (LOST_TO_RETENTION, HOLE))
        assert len(lost) == len(set(lost)), "a loss is recorded once"
        assert len(holes) == len(set(holes)), "a hole is recorded once"
        assert log.markers.issuperset(holes)
        assert set(holes).issuperset(log.markers.difference(range(log.start)))
        assert OffsetCommitter(self.tables).next_offset(source) == log.end
        for name in COMMIT_ORDER:
            kept = set(self.tables.offsets(name, source.partition))
            assert kept.isdisjoint(log.markers)
            assert kept.union(lost, holes) >= {offset for offset in range(log.end) if has_rows(name, offset)}
            assert kept <= {offset for offset in range(log.end) if has_rows(name, offset)}
            assert kept >= {o for o in range(log.start, log.end) if has_rows(name, o) and o not in log.markers}


TestExactlyOnce = ExactlyOnce.TestCase
