"""A loader that runs prefetcher gives what it would give alone, and stands where training stands."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from data_loader_world import MemoryLog, World, drain, names, requests

from pipeline.delta import TableError
from trainer.data.data_loader import DataLoaderError, DataLoaderState, Prefetcher
from trainer.data.samples import Sample

SETTINGS: dict[str, object] = {"max_epochs": 3, "replay_half_life": 4, "label_balance": 0.5, "replay_buffer_size": 12}


class Kitchen:
    """Where steps are made ready: notes what was, and waits at each for leave where it is closed."""

    def __init__(self) -> None:
        self.made: list[list[str]] = []
        self.threads: set[str] = set()
        self._changed = threading.Condition()
        self._leave: int | None = None

    def close(self) -> None:
        self._leave = 0

    def allow(self, steps: int) -> None:
        with self._changed:
            self._leave = (self._leave or 0) + steps
            self._changed.notify_all()

    def prepare(self, windows: list[Sample]) -> list[str]:
        with self._changed:
            assert self._changed.wait_for(lambda: self._leave is None or self._leave > 0, timeout=30)
            if self._leave is not None:
                self._leave -= 1
            self.made.append(names(windows))
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()
        return names(windows)

    def wait_for(self, steps: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.made) >= steps, timeout=30)


@pytest.fixture
def world() -> World:
    return World(MemoryLog())


@pytest.fixture
def kitchen() -> Kitchen:
    return Kitchen()


class Aheads:
    """Closes what it makes."""

    def __init__(self, world: World, kitchen: Kitchen) -> None:
        self._world, self._kitchen = world, kitchen
        self.made: list[Prefetcher[list[str]]] = []

    def __call__(self, **settings: object) -> Prefetcher[list[str]]:
        self.made.append(Prefetcher(self._world.data_loader(**SETTINGS | settings), self._kitchen.prepare))
        return self.made[-1]


@pytest.fixture
def ahead_of(world: World, kitchen: Kitchen) -> Iterator[Aheads]:
    aheads = Aheads(world, kitchen)
    yield aheads
    for prefetcher in aheads.made:
        prefetcher.close()


def rest(prefetcher: Prefetcher[list[str]]) -> list[list[str]]:
    return list(iter(prefetcher.next_batch, None))


def test_steps_are_those_of_the_feed_alone_in_the_same_order(world: World, ahead_of: Aheads) -> None:
    world.commit_as(requests(30), label="sql")
    prefetcher = ahead_of()
    assert rest(prefetcher) == drain(world.data_loader(**SETTINGS))
    assert (prefetcher.cursor, prefetcher.table_version, prefetcher.counts["samples"]) == (30, 30, 30)
    assert prefetcher.tables_read == {"accepted": 30, "rejected": 30}


def test_the_next_step_and_no_further_one_is_made_ready_while_one_runs(
    world: World, kitchen: Kitchen, ahead_of: Aheads
) -> None:
    world.commit_as(requests(30))
    prefetcher = ahead_of()
    kitchen.close()
    kitchen.allow(1)
    first = prefetcher.next_batch()
    assert kitchen.made == [first], "it is given although the next one is not ready"
    kitchen.allow(5)
    kitchen.wait_for(2)
    assert prefetcher.state().waiting, "asking waits for what is being made ready"
    assert len(kitchen.made) == 2
    assert prefetcher.next_batch() == kitchen.made[1]
    assert kitchen.threads == {"data-loader_0"}


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_what_was_ready_but_not_given_is_neither_lost_nor_given_twice_by_a_restart(
    world: World, ahead_of: Aheads, steps: int
) -> None:
    world.commit_as(requests(40))
    prefetcher, alone = ahead_of(), world.data_loader(**SETTINGS)
    before = [prefetcher.next_batch() for _ in range(steps)]
    state = DataLoaderState.model_validate_json(prefetcher.state().model_dump_json())
    whole = drain(world.data_loader(**SETTINGS))
    assert before == whole[:steps]
    for _ in range(steps):
        alone.poll()
        alone.next_samples()
    if steps:
        alone.poll()
    assert state == alone.snapshot().state()
    restarted = ahead_of()
    restarted.restore(state)
    assert rest(restarted) == whole[steps:] == rest(prefetcher)


def test_asking_where_it_stands_changes_nothing(world: World, ahead_of: Aheads) -> None:
    world.commit_as(requests(20))
    prefetcher, steps = ahead_of(), list[list[str]]()
    while (step := prefetcher.next_batch()) is not None:
        steps.append(step)
        assert prefetcher.state() == prefetcher.state()
        assert prefetcher.held_out == []
    assert steps == drain(world.data_loader(**SETTINGS))


def test_a_starved_feed_gives_nothing_until_something_comes(world: World, kitchen: Kitchen, ahead_of: Aheads) -> None:
    ids = requests(8)
    world.commit_as(ids[:4])
    prefetcher = ahead_of(max_epochs=1)
    assert prefetcher.next_batch() == ids[:4]
    assert [prefetcher.next_batch() for _ in range(3)] == [None] * 3
    world.commit_as(ids[4:])
    assert prefetcher.next_batch() == ids[4:]
    assert kitchen.made == [ids[:4], ids[4:]]


def test_what_comes_while_a_step_runs_is_in_the_next_one(world: World, ahead_of: Aheads) -> None:
    ids = requests(8)
    world.commit_as(ids[:4])
    prefetcher = ahead_of(max_epochs=1)
    assert prefetcher.next_batch() == ids[:4]
    prefetcher.state()  # The thread has looked, and found nothing.
    world.commit_as(ids[4:])
    assert prefetcher.next_batch() == ids[4:]


def test_an_outage_is_told_to_whoever_asks_for_the_next_step_and_loses_nothing(world: World, ahead_of: Aheads) -> None:
    world.commit_as(requests(20))
    whole = drain(world.data_loader(**SETTINGS))
    prefetcher = ahead_of()
    steps = [prefetcher.next_batch()]
    prefetcher.state()
    version, down = world.tables.version, True

    def fails(name: str) -> int:
        if down:
            raise TableError("table accepted: away")
        return version(name)

    world.tables.version = fails  # type: ignore[method-assign]
    steps.append(prefetcher.next_batch())
    for _ in range(2):
        with pytest.raises(TableError):
            prefetcher.next_batch()
    at = prefetcher.state()
    down = False
    assert steps + rest(prefetcher) == whole
    restarted = ahead_of()
    restarted.restore(at)
    assert steps + rest(restarted) == whole


def test_other_tables_are_told_too(world: World, ahead_of: Aheads) -> None:
    world.commit_as(requests(4))
    prefetcher = ahead_of()
    prefetcher._loader._reader.cursor = 9
    with pytest.raises(DataLoaderError):
        prefetcher.next_batch()


def test_an_error_of_any_other_kind_reaches_the_training_thread(world: World) -> None:
    world.commit_as(requests(4))

    def broken(_: list[Sample]) -> list[Sample]:
        raise ArithmeticError("no")

    prefetcher = Prefetcher(world.data_loader(), broken)
    with pytest.raises(ArithmeticError):
        prefetcher.next_batch()
    prefetcher.close()


def test_closing_leaves_no_thread(world: World, kitchen: Kitchen) -> None:
    world.commit_as(requests(12))
    prefetcher = Prefetcher(world.data_loader(), kitchen.prepare)
    kitchen.close()
    kitchen.allow(1)
    prefetcher.next_batch()
    (thread,) = prefetcher._thread._threads
    kitchen.allow(1)
    prefetcher.close()
    assert not thread.is_alive()


def test_a_feed_is_restored_by_its_own_thread_again_after_a_failure(world: World, ahead_of: Aheads) -> None:
    world.commit_as(requests(12))
    prefetcher = ahead_of()
    prefetcher.next_batch()
    state = prefetcher.state()
    restored = ahead_of()
    read_added, calls = world.tables.read_added, list[str]()

    def fails_once(name: str, *rest: object) -> object:
        calls.append(name)
        if len(calls) == 1:
            raise TableError("away")
        return read_added(name, *rest)  # type: ignore[arg-type]

    world.tables.read_added = fails_once  # type: ignore[method-assign, assignment]
    with pytest.raises(TableError):
        restored.restore(state)
    restored.restore(state)
    assert rest(restored) == rest(prefetcher)
