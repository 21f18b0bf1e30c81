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
    LOST_TO_RETENTION,
    Batch,
    ConflictError,
    FencedError,
    ForeignLogError,
    OffsetCommitter,
    SourcePartition,
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


class Worker:
    """A worker that behaves like ``pipeline.worker``, with a consumer at any position of the log."""

    def __init__(self, tables: MemoryTables) -> None:
        self.committer = OffsetCommitter(tables, SynchronousPool())
        self.position = 0

    def deliver(self, log_start: int, log_end: int, count: int) -> None:
        """Write delivered records. After a gap seek the consumer to the next offset."""
        offsets = list(range(max(self.position, log_start), min(self.position + count, log_end)))
        self.position += len(offsets)
        next_offset = self.committer.next_offset(SOURCE)
        lost = find_lost_offsets(SOURCE, next_offset, log_start, log_end)
        if lost:
            self.committer.record_loss(SOURCE, lost, 0)
            next_offset = self.committer.next_offset(SOURCE)
        selection = select_records(next_offset, offsets)
        if selection.selected:
            selected = [offsets[i] for i in selection.selected]
            self.committer.commit([batch(range(selected[0], selected[-1] + 1))])
        if selection.has_gap:
            self.position = self.committer.next_offset(SOURCE)


class ExactlyOnce(RuleBasedStateMachine):
    """Two workers believe that they own one partition. Consumers jump, workers crash between two commits or are
    overtaken during one, and the broker deletes old records. The tables contain every other record once."""

    workers = st.integers(0, 1)

    @initialize()
    def begin(self) -> None:
        self.tables = MemoryTables()
        self.pair = [Worker(self.tables), Worker(self.tables)]
        self.start = self.end = 0

    @rule(count=st.integers(1, 8))
    def publish(self, count: int) -> None:
        self.end += count

    @rule(who=workers, count=st.integers(1, 6))
    def deliver(self, who: int, count: int) -> None:
        try:
            self.pair[who].deliver(self.start, self.end, count)
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
        """Let one worker finish: every record is in the tables, or recorded as lost."""
        worker = Worker(self.tables)
        for _ in range(3):
            worker.deliver(self.start, self.end, self.end + 1)
        lost = [offset for losses in self.tables.tables["dead_letters"].lost for offset in losses]
        assert len(lost) == len(set(lost)), "a loss is recorded once"
        for name in COMMIT_ORDER:
            kept = set(self.tables.offsets(name))
            assert kept.union(lost) == set(range(self.end))
            assert kept.issuperset(range(self.start, self.end))


TestExactlyOnce = ExactlyOnce.TestCase
