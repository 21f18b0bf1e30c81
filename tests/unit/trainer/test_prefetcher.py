"""The prefetcher returns the steps of its data loader, and its state is that of training."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from data_loader_world import MemoryLog, World, drain, names, requests

from pipeline.delta import TableError
from trainer.data.data_loader import DataLoaderError, DataLoaderState, Prefetcher
from trainer.data.samples import Sample

SETTINGS: dict[str, object] = {"max_epochs": 3, "replay_half_life": 4, "label_balance": 0.5, "replay_buffer_size": 12}


class BlockingCollate:
    """A collate function that records its steps, and blocks at each one while it is closed."""

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

    def collate(self, samples: list[Sample]) -> list[str]:
        with self._changed:
            assert self._changed.wait_for(lambda: self._leave is None or self._leave > 0, timeout=30)
            if self._leave is not None:
                self._leave -= 1
            self.made.append(names(samples))
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()
        return names(samples)

    def wait_for(self, steps: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.made) >= steps, timeout=30)


@pytest.fixture
def world() -> World:
    return World(MemoryLog())


@pytest.fixture
def collate() -> BlockingCollate:
    return BlockingCollate()


class PrefetcherFactory:
    """Creates prefetchers, and closes them."""

    def __init__(self, world: World, collate: BlockingCollate) -> None:
        self._world, self._collate = world, collate
        self.made: list[Prefetcher[list[str]]] = []

    def __call__(self, **settings: object) -> Prefetcher[list[str]]:
        self.made.append(Prefetcher(self._world.data_loader(**SETTINGS | settings), self._collate.collate))
        return self.made[-1]


@pytest.fixture
def prefetcher_of(world: World, collate: BlockingCollate) -> Iterator[PrefetcherFactory]:
    factory = PrefetcherFactory(world, collate)
    yield factory
    for prefetcher in factory.made:
        prefetcher.close()


def rest(prefetcher: Prefetcher[list[str]]) -> list[list[str]]:
    """Return the remaining steps."""
    return list(iter(prefetcher.next_batch, None))


def test_steps_equal_those_of_the_data_loader_alone(world: World, prefetcher_of: PrefetcherFactory) -> None:
    world.commit_as(requests(30), label="sql")
    prefetcher = prefetcher_of()
    assert rest(prefetcher) == drain(world.data_loader(**SETTINGS))
    loader = prefetcher._loader
    assert (loader.cursor, loader.table_version, loader.counts["rows"]) == (30, 30, 30)
    assert prefetcher.tables_read == {"accepted": 30, "rejected": 30}


def test_exactly_one_step_is_prefetched(
    world: World, collate: BlockingCollate, prefetcher_of: PrefetcherFactory
) -> None:
    world.commit_as(requests(30))
    prefetcher = prefetcher_of()
    collate.close()
    collate.allow(1)
    first = prefetcher.next_batch()
    assert collate.made == [first], "it is returned although the next one is not prefetched"
    collate.allow(5)
    collate.wait_for(2)
    assert prefetcher.state().waiting, "the state waits for the step that is being prefetched"
    assert len(collate.made) == 2
    assert prefetcher.next_batch() == collate.made[1]
    assert collate.threads == {"data-loader_0"}


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_a_restart_neither_loses_nor_repeats_a_prefetched_step(
    world: World, prefetcher_of: PrefetcherFactory, steps: int
) -> None:
    world.commit_as(requests(40))
    prefetcher, alone = prefetcher_of(), world.data_loader(**SETTINGS)
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
    restarted = prefetcher_of()
    restarted.restore(state)
    assert rest(restarted) == whole[steps:] == rest(prefetcher)


def test_reading_the_state_changes_nothing(world: World, prefetcher_of: PrefetcherFactory) -> None:
    world.commit_as(requests(20))
    prefetcher, steps = prefetcher_of(), list[list[str]]()
    while (step := prefetcher.next_batch()) is not None:
        steps.append(step)
        assert prefetcher.state() == prefetcher.state()
        assert prefetcher.held_out == {}
    assert steps == drain(world.data_loader(**SETTINGS))


def test_without_samples_no_batch_is_returned_until_some_arrive(
    world: World, collate: BlockingCollate, prefetcher_of: PrefetcherFactory
) -> None:
    ids = requests(8)
    world.commit_as(ids[:4])
    prefetcher = prefetcher_of(max_epochs=1)
    assert prefetcher.next_batch() == ids[:4]
    assert [prefetcher.next_batch() for _ in range(3)] == [None] * 3
    world.commit_as(ids[4:])
    assert prefetcher.next_batch() == ids[4:]
    assert collate.made == [ids[:4], ids[4:]]


def test_samples_that_arrive_during_a_step_are_in_the_next_one(world: World, prefetcher_of: PrefetcherFactory) -> None:
    ids = requests(8)
    world.commit_as(ids[:4])
    prefetcher = prefetcher_of(max_epochs=1)
    assert prefetcher.next_batch() == ids[:4]
    prefetcher.state()  # The thread has polled and found nothing.
    world.commit_as(ids[4:])
    assert prefetcher.next_batch() == ids[4:]


def test_an_outage_is_raised_by_next_batch_and_loses_nothing(world: World, prefetcher_of: PrefetcherFactory) -> None:
    world.commit_as(requests(20))
    whole = drain(world.data_loader(**SETTINGS))
    prefetcher = prefetcher_of()
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
    restarted = prefetcher_of()
    restarted.restore(at)
    assert steps + rest(restarted) == whole


def test_different_tables_are_an_error_of_next_batch(world: World, prefetcher_of: PrefetcherFactory) -> None:
    world.commit_as(requests(4))
    prefetcher = prefetcher_of()
    prefetcher._loader._reader.cursor = 9
    with pytest.raises(DataLoaderError):
        prefetcher.next_batch()


def test_any_other_error_reaches_the_training_thread(world: World) -> None:
    world.commit_as(requests(4))

    def broken(_: list[Sample]) -> list[Sample]:
        raise ArithmeticError("no")

    prefetcher = Prefetcher(world.data_loader(), broken)
    with pytest.raises(ArithmeticError):
        prefetcher.next_batch()
    prefetcher.close()


def test_closing_ends_the_thread(world: World, collate: BlockingCollate) -> None:
    world.commit_as(requests(12))
    prefetcher = Prefetcher(world.data_loader(), collate.collate)
    collate.close()
    collate.allow(1)
    prefetcher.next_batch()
    (thread,) = prefetcher._thread._threads
    collate.allow(1)
    prefetcher.close()
    assert not thread.is_alive()


def test_a_failed_restore_can_be_repeated(world: World, prefetcher_of: PrefetcherFactory) -> None:
    world.commit_as(requests(12))
    prefetcher = prefetcher_of()
    prefetcher.next_batch()
    state = prefetcher.state()
    restored = prefetcher_of()
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
