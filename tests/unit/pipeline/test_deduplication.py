"""Tests of deduplication, with any delivery, rebalance and crash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from memory_tables import Crash, MemoryTables, crash_after, nothing
from recorded import conversation, record_of

from pipeline.batches import BuiltBatch, Record, build
from pipeline.deduplication import NO_DEDUPLICATION, ChunkIdentity, DeduplicationWindow, Deduplicator, WrittenRecord
from pipeline.delta import DeltaLog, TableError
from pipeline.offsets import COMMIT_ORDER, Batch, FencedError, OffsetCommitter, SourcePartition, select_records
from schemas.settings import Tables
from schemas.trace.record import Features

SOURCE = SourcePartition("traces", 0)
CONTEXT = 4
WAYS: tuple[Features, Features] = ("inline", "dropped")
PIECES = [
    record_of(
        f"r{request}",
        [replace(r, time_us=at + r.verify_step) for r in conversation(range(5, 12), prompt=3)],
        0,
        chunk=chunk,
        features=features,
    )
    for request, features in enumerate(WAYS)
    for chunk, at in ((0, 1), (1, 2), (1, 3))
]
"""Two requests of two chunks each. The second chunk exists in two versions with different times."""


def at(offset: int, piece: int) -> Record:
    return replace(PIECES[piece], offset=offset)


def written(offset: int, chunk: int = 0, time_us: int = 1, source: SourcePartition = SOURCE) -> WrittenRecord:
    return WrittenRecord(source, offset, ChunkIdentity("node", "request", chunk, time_us))


def reasons(built: BuiltBatch) -> list[tuple[int, str]]:
    letters = built.rows["dead_letters"]
    return list(zip(letters["offset"].to_pylist(), letters["reason"].to_pylist(), strict=True))


def test_duplicate_is_found_within_the_window_before_it() -> None:
    known = DeduplicationWindow(3, [written(5)])
    assert known.find_duplicate(written(8)) == 5
    assert known.find_duplicate(written(9)) is None
    assert known.find_duplicate(written(5)) is None, "a record does not repeat itself"
    for other in (written(6, chunk=1), written(6, time_us=2), written(6, source=SourcePartition("traces", 1))):
        assert known.find_duplicate(other) is None


def test_window_of_size_zero_finds_no_duplicate() -> None:
    assert build([at(0, 0), at(1, 0)], CONTEXT).dead_letters == {}
    assert len(NO_DEDUPLICATION) == 0


def test_duplicate_is_a_dead_letter_that_names_the_first_record() -> None:
    built = build([at(0, 0), at(1, 1), at(2, 0)], CONTEXT, window=DeduplicationWindow(10))
    assert reasons(built) == [(2, "duplicate")]
    assert built.rows["dead_letters"]["detail"].to_pylist() == ["repeats the record at offset 0"]
    assert built.rows["dead_letters"]["value"].to_pylist() == [PIECES[0].value]
    assert built.rows["accepted"]["offset"].to_pylist() == [0, 1]
    assert [one.offset for one in built.written] == [0, 1]


def test_rejected_record_is_not_in_the_window() -> None:
    broken = replace(at(0, 0), headers=(*PIECES[0].headers, ("rows", b"9")))
    built = build([broken, at(1, 0), at(2, 0)], CONTEXT, window=DeduplicationWindow(10))
    assert reasons(built) == [(0, "wrong_count"), (2, "duplicate")]


def test_duplicate_does_not_extend_the_window_of_the_first_record() -> None:
    built = build([at(0, 0), at(2, 0), at(4, 0)], CONTEXT, window=DeduplicationWindow(3))
    assert reasons(built) == [(2, "duplicate")]


def test_chunk_without_its_previous_chunk_is_counted() -> None:
    known = DeduplicationWindow(10)
    assert build([at(0, 0), at(1, 1)], CONTEXT, window=known).chunk_gaps == 0
    assert build([at(0, 1), at(1, 0), at(2, 2)], CONTEXT, window=known).chunk_gaps == 1
    assert build([at(0, 0), at(1, 1)], CONTEXT, window=DeduplicationWindow(0)).chunk_gaps == 0
    known.add([written(0)])
    assert known.has_previous_chunk(written(1, chunk=1))
    assert not known.has_previous_chunk(written(1, chunk=2))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 12), st.integers(0, 5))
def test_window_read_from_the_table_equals_the_window_that_grew(pieces: list[int], cut: int, window: int) -> None:
    log = [at(offset, piece) for offset, piece in enumerate(pieces)]
    cut = min(cut, len(log))
    whole = build(log, CONTEXT, window=DeduplicationWindow(window))
    tables = MemoryTables()
    tables.snapshot("traces").append(whole.rows["traces"], {})
    grown = DeduplicationWindow(window, [one for one in whole.written if one.offset < cut])
    grown.evict_before(cut)
    read = Deduplicator(tables, window).window(SOURCE, cut)
    assert (len(read), read._offsets, read._chunks) == (len(grown), grown._offsets, grown._chunks)
    assert len(read) <= window
    assert reasons(build(log[cut:], CONTEXT, window=read)) == [r for r in reasons(whole) if r[0] >= cut]


def test_restarted_worker_reads_its_window_from_the_table(tmp_path: Path) -> None:
    log = [at(offset, piece) for offset, piece in enumerate((0, 1, 3, 0, 4))]
    whole = build(log, CONTEXT, window=DeduplicationWindow(10))
    tables = DeltaLog(Tables(uri=str(tmp_path)))
    OffsetCommitter(tables).commit([Batch(SOURCE, log[-1].offset, whole.rows)])
    read = Deduplicator(tables, 3).window(SOURCE, len(log))
    grown = DeduplicationWindow(3, whole.written)
    grown.evict_before(len(log))
    assert (read._offsets, read._chunks) == (grown._offsets, grown._chunks)
    assert len(read) == 2


def test_window_of_a_revoked_partition_is_dropped() -> None:
    tables = MemoryTables()
    tables.snapshot("traces").append(build([at(0, 0)], CONTEXT).rows["traces"], {})
    deduplicator = Deduplicator(tables, 3)
    known = deduplicator.window(SOURCE, 1)
    deduplicator.retain([SOURCE])
    assert deduplicator.window(SOURCE, 1) is known
    deduplicator.retain([])
    again = deduplicator.window(SOURCE, 1)
    assert again is not known
    assert len(again) == 1


class Worker:
    """A worker that selects, builds and commits like ``pipeline.writer``."""

    def __init__(self, tables: MemoryTables, window: int) -> None:
        self.committer = OffsetCommitter(tables)
        self.deduplicator = Deduplicator(tables, window)
        self.position = 0

    def deliver(self, log: Sequence[Record], count: int) -> None:
        records = log[self.position : self.position + count]
        self.position += len(records)
        selection = select_records(self.committer.next_offset(SOURCE), [record.offset for record in records])
        some = [records[i] for i in selection.selected]
        if some:
            built = build(some, CONTEXT, window=self.deduplicator.window(SOURCE, some[0].offset))
            self.committer.commit([Batch(SOURCE, some[-1].offset, built.rows)])
            self.deduplicator.advance(SOURCE, some[-1].offset + 1, built.written)
        if selection.has_gap:
            self.position = self.committer.next_offset(SOURCE)


class Redelivery(RuleBasedStateMachine):
    """Two workers believe that they own a partition with duplicates. They crash between two commits, are fenced, and
    miss the result of a commit. The tables equal those of one worker that reads the log once from the beginning."""

    workers = st.integers(0, 1)

    @initialize(window=st.integers(0, 6))
    def begin(self, window: int) -> None:
        self.window = window
        self.tables = MemoryTables()
        self.log: list[Record] = []
        self.pair = [Worker(self.tables, window), Worker(self.tables, window)]

    @rule(pieces=st.lists(st.integers(0, len(PIECES)), min_size=1, max_size=5))
    def publish(self, pieces: list[int]) -> None:
        for piece in pieces:
            offset = len(self.log)
            self.log.append(at(offset, piece) if piece < len(PIECES) else replace(at(offset, 0), value=b"broken" * 9))

    @rule(who=workers, count=st.integers(1, 6))
    def deliver(self, who: int, count: int) -> None:
        worker = self.pair[who]
        try:
            worker.deliver(self.log, count)
        except (FencedError, TableError):
            worker.position = worker.committer.next_offset(SOURCE)

    @rule(who=workers, to=st.integers(0, 30))
    def consumer_jumps(self, who: int, to: int) -> None:
        self.pair[who].position = min(to, len(self.log))

    @rule(who=workers)
    def partition_assigned(self, who: int) -> None:
        self.pair[who].committer.invalidate([SOURCE])

    @rule(who=workers, commits=st.integers(0, 3), count=st.integers(1, 6))
    def dies_between_commits(self, who: int, commits: int, count: int) -> None:
        self.tables.before_append = crash_after(commits)
        try:
            self.deliver(who, count)
        except Crash:
            self.pair[who] = Worker(self.tables, self.window)
        finally:
            self.tables.before_append = nothing

    @rule(who=workers, commits=st.integers(0, 3), count=st.integers(1, 6))
    def does_not_hear_that_a_commit_succeeded(self, who: int, commits: int, count: int) -> None:
        step = crash_after(commits)

        def silent() -> None:
            try:
                step()
            except Crash:
                raise TableError("no answer") from None

        self.tables.after_append = silent
        try:
            self.deliver(who, count)
        finally:
            self.tables.after_append = nothing

    def teardown(self) -> None:
        worker = Worker(self.tables, self.window)
        for _ in range(2):
            worker.deliver(self.log, len(self.log))
        expected = build(self.log, CONTEXT, window=DeduplicationWindow(self.window))
        for name in COMMIT_ORDER:
            assert self.tables.read(name).equals(expected.rows[name]), name


TestRedelivery = Redelivery.TestCase
TestRedelivery.settings = settings(deadline=None, max_examples=40, stateful_step_count=30)
