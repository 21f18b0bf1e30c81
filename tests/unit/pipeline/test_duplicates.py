"""A record that repeats another is refused once and for all: however it is delivered, and whoever dies meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from memory_tables import Crash, MemoryTables, dies_after, nothing
from recorded import conversation, record_of

from pipeline.batches import Built, Record, build
from pipeline.deduplication import NOTHING, Duplicates, Identity, Known, Taken
from pipeline.delta import DeltaLog, TableError
from pipeline.offsets import COMMIT_ORDER, Batch, FencedError, Intake, Source, admit
from schemas.settings import Tables

SOURCE = Source("traces", 0)
CONTEXT = 4
PIECES = [
    record_of(f"r{request}", [replace(r, time_us=at) for r in conversation(range(5, 12), prompt=3)], 0, chunk=chunk)
    for request in range(2)
    for chunk, at in ((0, 1), (1, 2), (1, 3))
]
"""Two requests of two chunks each; of the second ones there are two, which are not the same."""


def at(offset: int, piece: int) -> Record:
    return replace(PIECES[piece], offset=offset)


def taken(offset: int, chunk: int = 0, time_us: int = 1, source: Source = SOURCE) -> Taken:
    return Taken(source, offset, Identity("node", "request", chunk, time_us))


def reasons(built: Built) -> list[tuple[int, str]]:
    letters = built.rows["dead_letters"]
    return list(zip(letters["offset"].to_pylist(), letters["reason"].to_pylist(), strict=True))


def test_a_record_repeats_what_was_taken_within_the_window_before_it() -> None:
    known = Known(3, [taken(5)])
    assert known.repeats(taken(8)) == 5
    assert known.repeats(taken(9)) is None
    assert known.repeats(taken(5)) is None, "nothing repeats itself"
    for other in (taken(6, chunk=1), taken(6, time_us=2), taken(6, source=Source("traces", 1))):
        assert known.repeats(other) is None


def test_a_window_of_nothing_knows_nothing() -> None:
    assert build([at(0, 0), at(1, 0)], CONTEXT).dead == {}
    assert len(NOTHING) == 0


def test_a_repetition_is_a_dead_letter_that_names_the_first_and_brings_no_row() -> None:
    built = build([at(0, 0), at(1, 1), at(2, 0)], CONTEXT, known=Known(10))
    assert reasons(built) == [(2, "duplicate")]
    assert built.rows["dead_letters"]["detail"].to_pylist() == ["repeats the record at offset 0"]
    assert built.rows["dead_letters"]["value"].to_pylist() == [PIECES[0].value]
    assert built.rows["accepted"]["offset"].to_pylist() == [0, 1]
    assert [one.offset for one in built.taken] == [0, 1]


def test_what_was_refused_is_not_remembered() -> None:
    broken = replace(at(0, 0), headers=(*PIECES[0].headers, ("rows", b"9")))
    built = build([broken, at(1, 0), at(2, 0)], CONTEXT, known=Known(10))
    assert reasons(built) == [(0, "wrong_count"), (2, "duplicate")]


def test_a_repetition_does_not_prolong_the_memory_of_the_first() -> None:
    built = build([at(0, 0), at(2, 0), at(4, 0)], CONTEXT, known=Known(3))
    assert reasons(built) == [(2, "duplicate")]


def test_a_chunk_whose_one_before_is_not_known_is_counted() -> None:
    known = Known(10)
    assert build([at(0, 0), at(1, 1)], CONTEXT, known=known).gaps == 0
    assert build([at(0, 1), at(1, 0), at(2, 2)], CONTEXT, known=known).gaps == 1
    assert build([at(0, 0), at(1, 1)], CONTEXT, known=Known(0)).gaps == 0
    known.add([taken(0)])
    assert known.follows(taken(1, chunk=1))
    assert not known.follows(taken(1, chunk=2))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 5), max_size=12), st.integers(0, 12), st.integers(0, 5))
def test_memory_read_from_the_table_is_the_memory_that_grew(pieces: list[int], cut: int, window: int) -> None:
    log = [at(offset, piece) for offset, piece in enumerate(pieces)]
    cut = min(cut, len(log))
    whole = build(log, CONTEXT, known=Known(window))
    tables = MemoryTables()
    tables.snapshot("accepted").append(whole.rows["accepted"], {})
    grown = Known(window, [one for one in whole.taken if one.offset < cut])
    grown.forget_before(cut)
    read = Duplicates(tables, window).known(SOURCE, cut)
    assert (len(read), read._offsets, read._pieces) == (len(grown), grown._offsets, grown._pieces)
    assert len(read) <= window
    assert reasons(build(log[cut:], CONTEXT, known=read)) == [r for r in reasons(whole) if r[0] >= cut]


def test_a_restarted_worker_reads_from_the_table_what_it_remembered(tmp_path: Path) -> None:
    log = [at(offset, piece) for offset, piece in enumerate((0, 1, 3, 0, 4))]
    whole = build(log, CONTEXT, known=Known(10))
    tables = DeltaLog(Tables(uri=str(tmp_path)))
    Intake(tables).commit([Batch(SOURCE, log[-1].offset, whole.rows)])
    read = Duplicates(tables, 3).known(SOURCE, len(log))
    grown = Known(3, whole.taken)
    grown.forget_before(len(log))
    assert (read._offsets, read._pieces) == (grown._offsets, grown._pieces)
    assert len(read) == 2


def test_what_is_known_of_a_partition_goes_with_it() -> None:
    tables = MemoryTables()
    tables.snapshot("accepted").append(build([at(0, 0)], CONTEXT).rows["accepted"], {})
    duplicates = Duplicates(tables, 3)
    known = duplicates.known(SOURCE, 1)
    duplicates.keep([SOURCE])
    assert duplicates.known(SOURCE, 1) is known
    duplicates.keep([])
    again = duplicates.known(SOURCE, 1)
    assert again is not known
    assert len(again) == 1


class Worker:
    """A worker as ``pipeline.writer`` wires it."""

    def __init__(self, tables: MemoryTables, window: int) -> None:
        self.intake = Intake(tables)
        self.duplicates = Duplicates(tables, window)
        self.position = 0

    def deliver(self, log: Sequence[Record], count: int) -> None:
        records = log[self.position : self.position + count]
        self.position += len(records)
        plan = admit(self.intake.wanted(SOURCE), [record.offset for record in records])
        some = [records[i] for i in plan.taken]
        if some:
            built = build(some, CONTEXT, known=self.duplicates.known(SOURCE, some[0].offset))
            self.intake.commit([Batch(SOURCE, some[-1].offset, built.rows)])
            self.duplicates.committed(SOURCE, some[-1].offset + 1, built.taken)
        if plan.gap:
            self.position = self.intake.wanted(SOURCE)


class Redelivery(RuleBasedStateMachine):
    """Two workers believe that they own a partition with repetitions in it. They die between two commits, are fenced,
    and do not hear that a commit succeeded: the tables are those of one who read the log once from the beginning."""

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
            worker.position = worker.intake.wanted(SOURCE)

    @rule(who=workers, to=st.integers(0, 30))
    def consumer_jumps(self, who: int, to: int) -> None:
        self.pair[who].position = min(to, len(self.log))

    @rule(who=workers)
    def partition_assigned(self, who: int) -> None:
        self.pair[who].intake.forget([SOURCE])

    @rule(who=workers, commits=st.integers(0, 3), count=st.integers(1, 6))
    def dies_between_commits(self, who: int, commits: int, count: int) -> None:
        self.tables.before_append = dies_after(commits)
        try:
            self.deliver(who, count)
        except Crash:
            self.pair[who] = Worker(self.tables, self.window)
        finally:
            self.tables.before_append = nothing

    @rule(who=workers, commits=st.integers(0, 3), count=st.integers(1, 6))
    def does_not_hear_that_a_commit_succeeded(self, who: int, commits: int, count: int) -> None:
        step = dies_after(commits)

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
        expected = build(self.log, CONTEXT, known=Known(self.window))
        for name in COMMIT_ORDER:
            assert self.tables.read(name).equals(expected.rows[name]), name


TestRedelivery = Redelivery.TestCase
TestRedelivery.settings = settings(deadline=None, max_examples=40, stateful_step_count=30)
