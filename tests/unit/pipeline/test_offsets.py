"""Tests of the exactly-once protocol: its decisions, and a model with crashes, rebalances and fencing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from memory_tables import Crash, MemoryTables, crash_after, nothing

from pipeline.delta import DeltaLog
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

SOURCE = SourcePartition("traces", 0)


def rows(name: str, offsets: range, source: SourcePartition = SOURCE) -> pa.Table:
    """Return one row per offset. Columns that the protocol does not read are null."""
    schema = TABLES[name]
    columns = {"topic": source.topic, "partition": source.partition}
    arrays = [
        pa.array(offsets if f.name == "offset" else [columns.get(f.name)] * len(offsets), type=f.type) for f in schema
    ]
    return pa.table(arrays, schema=schema)


def batch(offsets: range, source: SourcePartition = SOURCE) -> Batch:
    return Batch(source, offsets[-1], {name: rows(name, offsets, source) for name in COMMIT_ORDER})


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
    with pytest.raises(ForeignLogError, match=r"kafka\.traces_topic"):
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
    assert {OffsetCommitter(log).next_offset(SOURCE), *(log.version(name) for name in COMMIT_ORDER)} == {12, 4}


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
    other = SourcePartition("traces", 1)

    def interfere() -> None:
        tables.before_append = nothing
        OffsetCommitter(tables).commit([batch(range(2), other)])

    tables.before_append = interfere
    OffsetCommitter(tables).commit([batch(range(3))])
    assert sorted(tables.tables["traces"].rows) == [(0, 0, ""), (0, 1, ""), (0, 2, ""), (1, 0, ""), (1, 1, "")]


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


def test_delta_rejects_an_append_to_an_old_snapshot(tmp_path: Path) -> None:
    first, second = DeltaLog(Tables(uri=str(tmp_path))), DeltaLog(Tables(uri=str(tmp_path)))
    stale = first.snapshot("dead_letters")
    rows_ = dead_letters(range(1)).rows["dead_letters"]
    second.snapshot("dead_letters").append(rows_, {transaction_id("dead_letters", SourcePartition("traces", 1)): 0})
    with pytest.raises(ConflictError):
        stale.append(rows_, {transaction_id("dead_letters", SOURCE): 0})
    assert first.snapshot("dead_letters").transaction(transaction_id("dead_letters", SOURCE)) is None
    assert first.row_count("dead_letters") == 1


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


def dead_letters(offsets: range) -> Batch:
    """Return a batch of dead letters that is valid for a real table."""
    row = {"topic": "traces", "partition": 0, "time": 0, "day": 0, "reason": "r", "detail": "d"}
    empty = dict.fromkeys(TABLES["dead_letters"].names)
    letters = pa.Table.from_pylist([{**empty, **row, "offset": o} for o in offsets], schema=TABLES["dead_letters"])
    none = {name: TABLES[name].empty_table() for name in COMMIT_ORDER}
    return Batch(SOURCE, offsets[-1], {**none, "dead_letters": letters})


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


def batch_of(offsets: list[int], holes: tuple[range, ...]) -> Batch:
    """Return a batch of records with holes between or behind them."""
    last = max([*offsets, *(hole.stop - 1 for hole in holes)])
    made = {
        name: pa.concat_tables([TABLES[name].empty_table(), *(rows(name, range(o, o + 1)) for o in offsets)])
        for name in COMMIT_ORDER
    }
    return Batch(SOURCE, last, made, holes)


class Worker:
    """A worker that behaves like ``pipeline.worker``, with a consumer at any position of the log."""

    def __init__(self, tables: MemoryTables) -> None:
        self.committer = OffsetCommitter(tables, SynchronousPool())
        self.position = 0

    def deliver(self, log_start: int, log_end: int, count: int, markers: set[int]) -> None:
        """Write delivered records and pass holes. After another gap seek the consumer to the next offset.

        Args:
            log_start: First offset of the log.
            log_end: The offset after its last one.
            count: Offsets that the consumer moves.
            markers: Offsets at which no consumer receives a record.
        """
        passed = range(max(self.position, log_start), min(self.position + count, log_end))
        offsets = [offset for offset in passed if offset not in markers]
        self.position += len(passed)
        next_offset = self.committer.next_offset(SOURCE)
        lost = find_lost_offsets(SOURCE, next_offset, log_start, log_end)
        if lost:
            self.committer.record_loss(SOURCE, lost, 0)
            next_offset = self.committer.next_offset(SOURCE)
        holes = [hole for gap in find_gaps(next_offset, offsets) if (hole := hole_at(gap.start, gap.stop, markers))]
        selection = select_records(next_offset, offsets, holes)
        if selection.selected:
            self.committer.commit([batch_of([offsets[i] for i in selection.selected], selection.holes)])
        elif hole := hole_at(next_offset, log_end, markers):
            self.committer.commit([batch_of([], (hole,))])
        if selection.has_gap:
            self.position = self.committer.next_offset(SOURCE)


class ExactlyOnce(RuleBasedStateMachine):
    """Two workers believe that they own one partition. Consumers jump, workers crash between two commits or are
    overtaken during one, the broker deletes old records, and transactions leave holes. The tables contain every other
    record once, and every hole is recorded as one."""

    workers = st.integers(0, 1)

    @initialize()
    def begin(self) -> None:
        self.tables = MemoryTables()
        self.pair = [Worker(self.tables), Worker(self.tables)]
        self.start = self.end = 0
        self.markers: set[int] = set()

    @rule(count=st.integers(1, 8))
    def publish(self, count: int) -> None:
        self.end += count

    @rule(count=st.integers(1, 3))
    def transaction_ends(self, count: int) -> None:
        self.markers.update(range(self.end, self.end + count))
        self.end += count

    @rule(who=workers, count=st.integers(1, 6))
    def deliver(self, who: int, count: int) -> None:
        try:
            self.pair[who].deliver(self.start, self.end, count, self.markers)
        except FencedError:
            self.pair[who].position = self.pair[who].committer.next_offset(SOURCE)

    @rule(who=workers, to=st.integers(0, 40))
    def consumer_jumps(self, who: int, to: int) -> None:
        self.pair[who].position = min(to, self.end)

    @rule(who=workers)
    def partition_assigned(self, who: int) -> None:
        self.pair[who].committer.invalidate([SOURCE])

    @rule(who=workers, unwritten=st.sets(st.integers(0, 3), min_size=1), count=st.integers(1, 6))
    def dies_between_commits(self, who: int, unwritten: set[int], count: int) -> None:
        self.tables.before_append = crash_in(unwritten)
        try:
            self.deliver(who, count)
        except Crash:
            position = self.pair[who].position
            self.pair[who] = Worker(self.tables)
            self.pair[who].position = position
        finally:
            self.tables.before_append = nothing

    @rule(who=workers, commits=st.integers(0, 3), mine=st.integers(1, 6), theirs=st.integers(1, 6))
    def overtaken_in_a_commit(self, who: int, commits: int, mine: int, theirs: int) -> None:
        left = commits

        def overtake() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                self.tables.before_append = nothing
                self.deliver(1 - who, theirs)

        self.tables.before_append = overtake
        try:
            self.deliver(who, mine)
        finally:
            self.tables.before_append = nothing

    @rule(share=st.floats(0, 1))
    def broker_deletes(self, share: float) -> None:
        self.start += int((self.end - self.start) * share)

    @invariant()
    def nothing_is_doubled_or_out_of_order(self) -> None:
        for name in COMMIT_ORDER:
            offsets = self.tables.offsets(name)
            assert offsets == sorted(set(offsets))

    def teardown(self) -> None:
        """Let one worker finish: every record is in the tables, or recorded as lost, and every hole as a hole."""
        worker = Worker(self.tables)
        for _ in range(3):
            worker.deliver(self.start, self.end, self.end + 1, self.markers)
        letters = self.tables.tables["dead_letters"]
        lost, holes = letters.never_read(LOST_TO_RETENTION), letters.never_read(HOLE)
        assert len(lost) == len(set(lost)), "a loss is recorded once"
        assert len(holes) == len(set(holes)), "a hole is recorded once"
        assert self.markers.issuperset(holes)
        assert set(holes).issuperset(self.markers.difference(range(self.start)))
        for name in COMMIT_ORDER:
            kept = set(self.tables.offsets(name))
            assert kept.isdisjoint(self.markers)
            assert kept.union(lost, holes) == set(range(self.end))
            assert kept.issuperset(set(range(self.start, self.end)) - self.markers)


TestExactlyOnce = ExactlyOnce.TestCase
