"""Which samples the data loader replays and takes first, by age and label, and how it weights stale branches."""

from __future__ import annotations

from collections import Counter

import pytest
from data_loader_world import MemoryLog, World, as_json, drain, names, requests

from trainer.data.data_loader import DataLoader


@pytest.fixture
def world() -> World:
    return World(MemoryLog())


def trained_loader(world: World, **settings: object) -> DataLoader:
    """Return a data loader that has trained on everything committed."""
    loader = world.data_loader(batch_size=1, replay_batch_size=0, max_epochs=10_000, **settings)
    while True:
        loader.poll()
        if not loader.waiting:
            return loader
        loader.next_samples()


def replayed(loader: DataLoader, draws: int) -> Counter[str]:
    return Counter(name for _ in range(draws) for name in names(loader.next_samples()))


def test_old_samples_are_replayed_less_often_by_the_half_life(world: World) -> None:
    ids = requests(8)
    world.commit_as(ids)
    seen = replayed(trained_loader(world, replay_half_life=2), 1500)
    odds = [2.0 ** (-age / 2) for age in range(7, -1, -1)]
    assert [seen[i] / 1500 for i in ids] == pytest.approx([o / sum(odds) for o in odds], abs=0.04)


def test_a_rare_label_is_replayed_as_often_as_the_balance_says(world: World) -> None:
    ids = requests(10)
    world.commit_as(ids[:8], label="sql")
    world.commit_as(ids[8:9], label="math")
    world.commit_as(ids[9:])
    # Eight samples of one label, one of another, and one without a label.
    for balance, rare in ((0.0, 1 / 10), (1.0, 1 / 3)):
        seen = replayed(trained_loader(world, label_balance=balance), 1500)
        assert [seen[i] / 1500 for i in ids[8:]] == pytest.approx([rare, rare], abs=0.04)


def test_samples_of_a_rare_label_have_no_more_epochs_than_others(world: World) -> None:
    ids = requests(9)
    world.commit_as(ids[:8], label="sql")
    world.commit_as(ids[8:], label="math")
    passes = Counter(
        name for step in drain(world.data_loader(max_epochs=3, label_balance=1, replay_half_life=1)) for name in step
    )
    assert max(passes.values()) == 3
    assert set(passes) == set(ids)


def test_a_waiting_rare_label_is_advanced_a_little_and_nothing_is_skipped(
    world: World,
) -> None:
    ids = requests(16)
    common, rare = ids[:14], ids[14:]
    world.commit_as(common[:6], label="sql")
    world.commit_as(rare, label="math")
    firsts = {}
    for balance in (0.0, 1.0):
        loader = world.data_loader(batch_size=2, replay_batch_size=0, max_epochs=1, label_balance=balance)
        steps = drain(loader)
        assert Counter(name for step in steps for name in step) == Counter([*common[:6], *rare])
        assert all(step == sorted(step, key=ids.index) for step in steps)
        assert steps[0][0] == ids[0], "the oldest is always taken"
        firsts[balance] = next(i for i, step in enumerate(steps) if set(step) & set(rare))
    assert firsts == {0.0: 3, 1.0: 0}


def test_branches_of_old_drafts_count_less_and_accepted_samples_do_not(world: World) -> None:
    ids = requests(3)
    for request, version in zip(ids, ("day-0-head-0", "4", "12"), strict=True):
        world.commit_as([request], speculator=version)
    loader = world.data_loader(batch_size=3, replay_batch_size=0, staleness_half_life=4, max_epochs=1)
    loader.poll()
    samples = loader.next_samples()
    assert [{b.weight for b in w.branches} for w in samples] == [{1 / 8}, {1 / 4}, {1.0}]
    assert {w.weight for w in samples} == {1.0}
    assert loader.counts["branches_stale"] == 6


def test_a_replayed_branch_grows_stale_with_newer_versions(world: World) -> None:
    ids = requests(2)
    world.commit_as(ids[:1], speculator="1")
    loader = world.data_loader(batch_size=1, replay_batch_size=0, staleness_half_life=1)
    weights = []
    for _ in range(2):
        loader.poll()
        weights += [sample.branches[0].weight for sample in loader.next_samples()]
    world.commit_as(ids[1:], speculator="3")
    loader.poll()
    assert names(loader.next_samples()) == ids[1:]
    (old,) = [w for _ in range(8) for w in loader.next_samples() if w.request == ids[0]][:1]
    assert (weights, old.branches[0].weight) == ([1.0, 1.0], 1 / 4)


def test_a_restored_data_loader_knows_the_newest_version(world: World) -> None:
    ids = requests(3)
    world.commit_as(ids[:1], speculator="9")
    world.commit_as(ids[1:], speculator="1")
    settings: dict[str, object] = {"batch_size": 1, "replay_batch_size": 0, "staleness_half_life": 8, "max_epochs": 1}
    # The sample of the newest version has left the replay buffer, so rereading does not show that version.
    loader = world.data_loader(replay_buffer_size=1, **settings)
    for _ in range(2):
        loader.poll()
        loader.next_samples()
    restored = world.data_loader(replay_buffer_size=1, **settings)
    restored.restore(as_json(loader))
    assert [b.weight for b in restored.next_samples()[0].branches] == [1 / 2] * 3
