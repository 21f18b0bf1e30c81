"""Which versions of the tables are read, how branches are joined, and how deleted versions are handled."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from data_loader_world import MemoryLog, World, as_json, drain, names, requests, with_values
from deltalake import CommitProperties, Transaction, write_deltalake
from recorded import conversation, record_of, tables_of, verify_step_of

from pipeline.delta import OLDEST, TableError
from schemas.batches import TABLES
from schemas.trace.record import DraftSource
from trainer.data.data_loader import DataLoaderError
from trainer.data.samples import Sample
from trainer.data.table_reader import DROPPED_BRANCHES


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.on_disk(tmp_path)


@pytest.fixture
def in_memory() -> World:
    return World(MemoryLog())


def test_rows_of_another_line_are_not_read_and_those_of_another_target_are_counted(world: World) -> None:
    ids = requests(8)
    world.commit(ids[:2], line="other")
    world.commit(ids[2:4], target="f" * 32)
    world.commit(ids[4:])
    loader = world.data_loader(max_epochs=1)
    assert drain(loader) == [ids[4:]]
    assert (loader.counts["foreign_rows"], loader.counts["rows"]) == (2, 4)


def test_the_tables_are_not_read_while_enough_samples_wait(in_memory: World) -> None:
    for request in requests(20):
        in_memory.commit([request])
    loader = in_memory.data_loader()
    for _ in range(5):
        loader.poll()
    assert loader.table_version == 20
    assert loader.cursor == 8, "one read of commits, then none until they are used"
    drain(loader)
    assert loader.cursor == 20
    assert loader.tables_read == {"accepted": 20, "rejected": 20}


def test_a_flooded_data_loader_reads_only_the_branches_that_it_needs(in_memory: World) -> None:
    ids = requests(120)
    in_memory.commit_as(ids)
    loader = in_memory.data_loader()
    loader.poll()
    assert loader.tables_read == {"accepted": 8, "rejected": 8}
    assert (loader.table_version - loader.cursor, loader.waiting) == (112, 8)
    most, samples = 0, list[Sample]()
    while loader.cursor < 120 or loader.waiting >= 4:
        loader.poll()
        most = max(most, loader.waiting + loader._reader.pending)
        samples += loader.next_samples()
    assert most < 4 + 8, "the rest of a step, and one more read"
    assert loader.tables_read["rejected"] == 120
    assert {(w.request, len(w.branches)) for w in samples} >= {(i, 3) for i in ids[:116]}


def test_branches_are_joined_however_early_they_were_committed(in_memory: World) -> None:
    ids = requests(40)
    for i in range(0, 40, 20):
        in_memory.commit(ids[i : i + 20], names=["rejected"])
    in_memory.offset = 0
    loader = in_memory.data_loader(batch_size=1, replay_batch_size=0, max_epochs=1, replay_buffer_size=1)
    kept, needed = [], []
    for request in ids:
        in_memory.commit([request], names=["accepted"])
        loader.poll()
        (sample,) = loader.next_samples()
        assert (sample.request, len(sample.branches)) == (request, 3)
        kept.append(loader._reader.pending)
        needed.append(loader.snapshot().state().versions_needed["rejected"])
    assert kept == [*range(117, -1, -3)]
    assert (needed[0], needed[-1]) == (0, 0), "one read brought both commits"


def test_pending_rows_do_not_hold_earlier_versions(in_memory: World) -> None:
    ids = requests(60)
    for i in range(0, 60, 3):
        in_memory.commit(ids[i : i + 3], names=["rejected"])
    in_memory.offset = 0
    loader = in_memory.data_loader(batch_size=1, replay_batch_size=0, max_epochs=1, replay_buffer_size=1)
    needed = []
    for request in ids:
        in_memory.commit([request], names=["accepted"])
        loader.poll()
        assert len(loader.next_samples()[0].branches) == 3
        needed.append(loader.snapshot().state().versions_needed["rejected"])
    assert sorted(set(needed)) == [0, 8, 16], "the starts of the reads that found them"
    assert needed == sorted(needed)


def test_branches_are_joined_however_the_commits_interleave(world: World) -> None:
    ids = requests(4)
    world.commit(ids[:2], names=["rejected"])
    world.offset = 0
    loader = world.data_loader(batch_size=1, replay_batch_size=0, max_epochs=1)
    loader.poll()
    assert loader.next_samples() == []
    # The second chunk's branches are committed, its sample is not: they are pending.
    world.commit(ids[:1], names=["accepted"])
    loader.poll()
    (first,) = loader.next_samples()
    world.commit(ids[1:2], names=["accepted"])
    loader.poll()
    (second,) = loader.next_samples()
    for sample in (first, second):
        assert [(b.root, b.accepted_prefix, b.tokens[1]) for b in sample.branches] == [
            (4, 1, 19),
            (6, 1, 19),
            (8, 1, 19),
        ]
    assert loader.counts["branches"] == 6


def test_branches_whose_root_is_in_another_chunk_are_counted(world: World) -> None:
    (request,) = requests(1)
    verify_steps = [
        verify_step_of(3, 10, [1], 2, [9, 9]),
        verify_step_of(4, 11, [2], 3, [7, 7], logprob=-5.0),
    ]
    rows = tables_of(record_of(request, verify_steps, 0, chunk=1))
    for name in ("rejected", "accepted"):
        world.tables.append(name, rows[name])
    loader = world.data_loader(batch_size=1, replay_batch_size=0)
    loader.poll()
    (sample,) = loader.next_samples()
    assert [(b.tokens, b.draft_logprobs) for b in sample.branches] == [((7, 7), (-5.0, -5.0))]
    assert loader.counts["branches_without_root"] == 1


def test_branches_that_cannot_train_are_counted_by_reason(in_memory: World) -> None:
    without_sample, without_features, without_teacher, improbable = requests(4)
    in_memory.commit([without_sample], names=("rejected",))
    in_memory.commit_bare(without_features, 2, before=False)
    rows = tables_of(record_of(without_teacher, conversation(range(11), 4), in_memory.offset))
    unknown = {"loss_mask": [False] * 10, "teacher_ids": [], "teacher_logprobs": []}
    steps = [verify_step_of(0, 0, [0, 1], 2), verify_step_of(1, 2, [2], 3, [7, 7], logprob=-5.0)]
    other = tables_of(record_of(improbable, steps, in_memory.offset + 1))
    for name in ("rejected", "accepted"):
        in_memory.tables.append(name, with_values(rows[name], **unknown))
        in_memory.tables.append(name, other[name])
    loader = in_memory.data_loader()
    loader.poll()
    assert {reason: loader.counts[kind] for reason, kind in DROPPED_BRANCHES.items()} == {
        "no_features": 2,
        "no_sample": 3,
        "no_root": 0,
        "no_teacher": 3,
        "improbable": 1,
    }
    assert loader.counts["branches"] == 1


def test_tokens_of_the_suffix_drafter_train_but_have_no_probability_of_the_serving_draft(world: World) -> None:
    both, suffix = int(DraftSource.SPECULATOR | DraftSource.SUFFIX), int(DraftSource.SUFFIX)
    (request,) = requests(1)
    prompt, *steps = conversation(range(11), 4)
    sources = [None, (both, suffix), (suffix, suffix)]
    drafted = [
        replace(step, draft_sources=of_step, speculator="" if of_step == (suffix, suffix) else "7")
        for step, of_step in zip(steps, sources, strict=True)
    ]
    rows = tables_of(record_of(request, [prompt, *drafted], 0))
    for name in ("rejected", "accepted"):
        world.tables.append(name, rows[name])
    loader = world.data_loader(batch_size=1, replay_batch_size=0)
    loader.poll()
    (sample,) = loader.next_samples()
    assert [branch.by_speculator for branch in sample.branches] == [True, True, False]
    known = [[not math.isnan(logprob) for logprob in branch.draft_logprobs] for branch in sample.branches]
    assert known == [[True, True], [True, False], [False, False]]
    assert sample.output_tokens == 7, "accepted tokens count whatever proposed them"
    assert loader._reader.newest_drafted_by == 7


def test_branches_of_the_suffix_drafter_do_not_go_stale(world: World) -> None:
    ids = requests(2)
    world.commit_as(ids[:1], speculator="1", draft_sources=[2, 2])
    world.commit_as(ids[1:], speculator="3")
    loader = world.data_loader(batch_size=2, replay_batch_size=0, staleness_half_life=1)
    loader.poll()
    assert [{branch.weight for branch in sample.branches} for sample in loader.next_samples()] == [{1.0}, {1.0}]
    assert loader.counts["branches_stale"] == 0


def test_an_outage_of_the_tables_loses_nothing(world: World) -> None:
    ids = requests(4)
    world.commit(ids)
    loader = world.data_loader(max_epochs=1)
    read_added, calls = world.tables.read_added, list[str]()

    def fails(name: str, *rest: object) -> object:
        calls.append(name)
        if len(calls) in (1, 3):
            raise TableError(f"table {name}: gone")
        return read_added(name, *rest)  # type: ignore[arg-type]

    world.tables.read_added = fails  # type: ignore[method-assign, assignment]
    for _ in range(2):
        with pytest.raises(TableError):
            loader.poll()
    loader.poll()
    samples = loader.next_samples()
    assert names(samples) == ids
    assert all(len(w.branches) == 3 for w in samples)


def test_different_tables_are_rejected_with_the_setting_to_change(world: World, tmp_path: Path) -> None:
    world.commit(requests(4))
    state = world.data_loader().snapshot().state().model_copy(update={"cursor": 9})
    loader = world.data_loader()
    loader._reader.cursor = state.cursor
    with pytest.raises(DataLoaderError, match=r"tables\.uri .* train\.checkpoint_dir"):
        loader.poll()


def forget(world: World, version: int) -> None:
    """Mark both tables as maintenance does before it deletes rows of earlier versions."""
    mark = CommitProperties(app_transactions=[Transaction(OLDEST, version)])
    for name in ("accepted", "rejected"):
        nothing = TABLES[name].empty_table()
        write_deltalake(world.tables.open(name), nothing, mode="append", commit_properties=mark)


def test_a_late_data_loader_skips_deleted_versions_and_counts_them(world: World) -> None:
    ids = requests(6)
    for request in ids:
        world.commit([request])
    forget(world, 4)
    loader = world.data_loader(batch_size=1, replay_batch_size=0, max_epochs=1)
    assert drain(loader) == [[ids[4]], [ids[5]]]
    assert loader.counts["versions_deleted"] == 4
    assert loader.counts["branches"] == 6


def test_a_restart_continues_without_deleted_samples(world: World) -> None:
    ids = requests(6)
    for request in ids:
        world.commit([request])
    loader = world.data_loader(batch_size=2, replay_batch_size=0, max_epochs=1)
    loader.poll()
    loader.next_samples()
    state = as_json(loader)
    assert state.versions_needed == {"accepted": 0, "rejected": 0}
    forget(world, 3)
    restored = world.data_loader(batch_size=2, replay_batch_size=0, max_epochs=1)
    restored.restore(state)
    assert restored.counts["samples_deleted"] == 3
    assert restored.counts["versions_deleted"] == 3
    assert drain(restored) == [[ids[3], ids[4]]]
