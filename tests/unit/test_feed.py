"""What the feed gives, in which order, how often, and that a restarted feed goes on as if nothing had been."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from deltalake import CommitProperties, Transaction, write_deltalake
from recorded import LINE, TARGET, WIDTH, conversation, record_of, round_of, tables_of

from pipeline.table import OLDEST, DeltaLog, TableError
from schemas.batches import TABLES
from schemas.settings import Tables, Train
from trainer.feed import Feed, FeedError, FeedState, held_back
from trainer.windows import Window

SHARE = 0.25


def requests(n: int, *, kept_back: bool = False) -> list[str]:
    """Ids on one side of the split."""
    ids = (f"request-{i}" for i in range(10_000))
    return [i for i in ids if held_back(i, SHARE) is kept_back][:n]


class World:
    """Tables that records are committed to as the stream does: ``rejected`` before ``accepted``."""

    def __init__(self, folder: Path) -> None:
        self.tables = DeltaLog(Tables(uri=str(folder)))
        self.tables.create()
        self.offset = 0
        self.recomputed: list[int] = []

    def commit(self, ids: Sequence[str], *, names: Sequence[str] = ("rejected", "accepted"), **lineage: str) -> None:
        records = []
        for request in ids:
            tokens = [(self.offset * 3 + i) % 19 for i in range(11)]
            records.append(record_of(request, conversation(tokens, 4), self.offset, **lineage))  # type: ignore[arg-type]
            self.offset += 1
        rows = tables_of(*records)
        for name in names:
            self.tables.append(name, rows[name])

    def feed(self, **settings: object) -> Feed:
        defaults = {"windows_per_step": 4, "replay_per_step": 2, "held_back_share": SHARE, "rejected_min_prob": 0.1}
        return Feed(self.tables, Train.model_validate(defaults | settings), TARGET, LINE, self.states)

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """A target whose state after each token names the token and how many came before."""
        self.recomputed.append(len(tokens))
        return (tokens + 100 * torch.arange(len(tokens)))[:, None].expand(-1, WIDTH).bfloat16()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def names(windows: Sequence[Window]) -> list[str]:
    return [window.request for window in windows]


def drain(feed: Feed) -> list[list[str]]:
    """Steps until there is nothing left."""
    steps = []
    while True:
        feed.poll()
        if not (windows := feed.next()):
            return steps
        steps.append(names(windows))


def test_held_back_requests_are_never_trained_on(world: World) -> None:
    trained, kept = requests(12), requests(5, kept_back=True)
    world.commit([*trained[:6], *kept[:3], *trained[6:], *kept[3:]])
    feed = world.feed(max_passes=2)
    seen = Counter(name for step in drain(feed) for name in step)
    assert set(seen) == set(trained)
    assert names(feed.held_back) == kept


def test_the_split_takes_its_share_and_does_not_depend_on_the_process(world: World) -> None:
    ids = [f"request-{i}" for i in range(4000)]
    assert sum(held_back(i, SHARE) for i in ids) == pytest.approx(1000, abs=110)
    # Fixed for good: another hash would train on what versions were compared on.
    assert [held_back(f"request-{i}", 0.5) for i in range(8)] == [True, False, False, False, False, False, True, False]


def test_only_the_newest_held_back_windows_are_kept(world: World) -> None:
    kept = requests(6, kept_back=True)
    world.commit(kept)
    feed = world.feed(held_back_windows=2)
    feed.poll()
    assert names(feed.held_back) == kept[-2:]


def test_new_windows_come_in_the_order_of_the_table_mixed_with_earlier_ones(world: World) -> None:
    ids = requests(12)
    world.commit(ids[:6])
    world.commit(ids[6:])
    feed = world.feed(max_passes=3)
    steps = drain(feed)
    first_seen = list(dict.fromkeys(name for step in steps for name in step))
    assert first_seen == ids
    assert steps[0] == ids[:4], "without a history a step is all new"
    assert steps[1][:2] == ids[4:6], "then two new and two replayed"
    assert set(steps[1][2:]) <= set(ids[:4])


def test_no_window_is_passed_over_more_often_than_allowed_and_a_starved_feed_stops(world: World) -> None:
    ids = requests(9)
    world.commit(ids)
    feed = world.feed(max_passes=3)
    passes = Counter(name for step in drain(feed) for name in step)
    assert set(passes) == set(ids)
    assert max(passes.values()) == 3
    assert feed.next() == []
    assert sum(passes.values()) > 9 * 3 - 4, "only what does not fill a step is left"


def test_a_step_is_full_or_is_not_taken(world: World) -> None:
    world.commit(requests(3))
    feed = world.feed()
    assert drain(feed) == []
    world.commit(requests(4)[3:])
    assert len(drain(feed)[0]) == 4


def test_history_is_bounded(world: World) -> None:
    ids = requests(12)
    for request in ids:
        world.commit([request])
    feed = world.feed(windows_per_step=1, replay_per_step=0, history_windows=2, max_passes=1000)
    for _ in ids:
        feed.poll()
        feed.next()
    assert {name for _ in range(30) for name in names(feed.next())} == set(ids[-2:])


def test_rows_of_another_line_or_target_are_left_out_and_counted(world: World) -> None:
    ids = requests(8)
    world.commit(ids[:2], line="other")
    world.commit(ids[2:4], target="f" * 32)
    world.commit(ids[4:])
    feed = world.feed(max_passes=1)
    assert drain(feed) == [ids[4:]]
    assert (feed.counts["foreign_windows"], feed.counts["windows"]) == (4, 4)


def test_the_table_is_not_read_while_enough_windows_wait(world: World) -> None:
    for request in requests(20):
        world.commit([request])
    feed = world.feed()
    for _ in range(5):
        feed.poll()
    assert feed.table_version == 20
    assert feed.cursor == 8, "one read of commits, then a wait until they are used"
    drain(feed)
    assert feed.cursor == 20
    assert feed.tables_read == {"accepted": 20, "rejected": 20}


def test_branches_come_with_their_window_however_the_commits_interleave(world: World) -> None:
    ids = requests(4)
    world.commit(ids[:2], names=["rejected"])
    world.offset = 0
    feed = world.feed(windows_per_step=1, replay_per_step=0, max_passes=1)
    feed.poll()
    assert feed.next() == []
    # The second chunk's branches are on the table, its window is not: they wait for it.
    world.commit(ids[:1], names=["accepted"])
    feed.poll()
    (first,) = feed.next()
    world.commit(ids[1:2], names=["accepted"])
    feed.poll()
    (second,) = feed.next()
    for window in (first, second):
        assert [(b.root, b.accepted_prefix, b.tokens[1]) for b in window.branches] == [
            (4, 1, 19),
            (6, 1, 19),
            (8, 1, 19),
        ]
    assert feed.counts["branches"] == 6


def test_branches_that_cannot_or_should_not_be_learned_from_are_counted(world: World) -> None:
    (request,) = requests(1)
    rounds = [
        round_of(3, 10, [1], 2, [9, 9]),
        round_of(4, 11, [2], 3, [8, 8], logprob=-5.0),
        round_of(5, 12, [3], 4, [7, 7]),
    ]
    rows = tables_of(record_of(request, rounds, 0, chunk=1))
    for name in ("rejected", "accepted"):
        world.tables.append(name, rows[name])
    feed = world.feed(windows_per_step=1, replay_per_step=0, rejected_min_prob=0.1)
    feed.poll()
    (window,) = feed.next()
    assert [b.tokens for b in window.branches] == [(7, 7)]
    assert feed.counts["branches_without_root"] == 1
    assert feed.counts["branches_unlikely"] == 1


def test_long_windows_are_cut(world: World) -> None:
    world.commit(requests(1))
    feed = world.feed(windows_per_step=1, replay_per_step=0, max_passes=1, max_window_tokens=4)
    feed.poll()
    lengths = []
    while windows := feed.next():
        lengths += [len(w) for w in windows]
    # Ten tokens with features: the first piece has a teacher at its last one only.
    assert lengths == [4, 4, 2]


def commit_bare(world: World, request: str, first_round: int, *, before: bool = True) -> None:
    """Rows of a chunk whose features are to be recomputed, from one of the request's rounds on."""
    rounds = conversation([5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], 4)
    known = [token for r in rounds[:first_round] for token in r.tokens] if before else []
    rows = tables_of(record_of(request, rounds[first_round:], world.offset, features="recompute", before=known))
    world.offset += 1
    for name in ("rejected", "accepted"):
        world.tables.append(name, rows[name])


def test_features_that_did_not_travel_are_those_of_the_whole_request_computed_once(world: World) -> None:
    (request,) = requests(1)
    commit_bare(world, request, 2)
    feed = world.feed(windows_per_step=1, replay_per_step=0, max_passes=2)
    feed.poll()
    assert world.recomputed == [], "nothing is computed before it is used"
    (window,) = feed.next()
    assert window.tokens.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert window.known.tolist() == [False] * 6 + [True] * 4
    assert window.features[:, 0].tolist() == world.states(window.tokens)[:, 0].tolist()
    assert [(b.root, b.accepted_prefix) for b in window.branches] == [(6, 1), (8, 1)]
    world.recomputed.clear()
    assert feed.next() == [window]
    assert world.recomputed == []


def test_a_piece_of_a_cut_window_is_recomputed_behind_all_tokens_before_it(world: World) -> None:
    (request,) = requests(1)
    commit_bare(world, request, 0)
    feed = world.feed(windows_per_step=1, replay_per_step=0, max_passes=1, max_window_tokens=4)
    feed.poll()
    pieces = [window for _ in range(3) for window in feed.next()]
    assert [p.features[:, 0].tolist() for p in pieces] == [
        world.states(torch.arange(5, 15))[at : at + 4, 0].tolist() for at in (0, 4, 8)
    ]
    assert feed.counts["pieces_recomputed"] == 3


def test_held_back_windows_are_recomputed_too(world: World) -> None:
    (request,) = requests(1, kept_back=True)
    commit_bare(world, request, 0)
    feed = world.feed()
    feed.poll()
    assert [len(w.features) for w in feed.held_back] == [10]


def test_a_window_that_lost_the_tokens_before_it_is_left_out_and_counted(world: World) -> None:
    first, second = requests(2)
    commit_bare(world, first, 2, before=False)
    commit_bare(world, second, 2)
    feed = world.feed(windows_per_step=1, replay_per_step=0, max_passes=1)
    assert drain(feed) == [[second]]
    assert feed.counts["windows_without_beginning"] == 1


def as_json(feed: Feed) -> FeedState:
    return FeedState.model_validate_json(feed.state().model_dump_json())


@pytest.mark.parametrize("steps_before", [0, 1, 3, 7])
def test_a_restored_feed_gives_the_same_windows_in_the_same_order(world: World, steps_before: int) -> None:
    ids = requests(30)
    kept = requests(6, kept_back=True)
    for i in range(0, 30, 3):
        world.commit([*ids[i : i + 3], *kept[i // 5 : i // 5 + 1]])
    settings: dict[str, object] = {"history_windows": 10, "held_back_windows": 3, "max_passes": 3}
    feed = world.feed(**settings)
    for _ in range(steps_before):
        feed.poll()
        feed.next()
    restored = world.feed(**settings)
    restored.restore(as_json(feed))
    assert restored.state().model_dump(exclude={"reread_after", "reread_rejected_after"}) == feed.state().model_dump(
        exclude={"reread_after", "reread_rejected_after"}
    )
    again = world.feed(**settings)
    again.restore(as_json(restored))
    world.commit(requests(33)[30:])
    wanted = drain(feed)
    assert drain(restored) == wanted
    assert drain(again) == wanted
    assert len(wanted) >= 7
    assert names(restored.held_back) == names(feed.held_back)
    assert restored.tables_read == feed.tables_read
    branches = [len(w.branches) for w in feed.held_back]
    assert [len(w.branches) for w in restored.held_back] == branches
    assert sum(branches) > 0


def test_branches_that_wait_at_a_checkpoint_are_there_after_it(world: World) -> None:
    ids = requests(2)
    settings: dict[str, object] = {"windows_per_step": 1, "replay_per_step": 0}
    world.commit(ids[:1])
    world.commit(ids[1:], names=["rejected"])
    feed = world.feed(**settings)
    feed.poll()
    restored = world.feed(**settings)
    restored.restore(as_json(feed))
    world.offset = 1
    world.commit(ids[1:], names=["accepted"])
    found = []
    for _ in range(2):
        restored.poll()
        found += restored.next()
    assert [(w.request, len(w.branches)) for w in found] == [(ids[0], 3), (ids[1], 3)]


def test_an_outage_of_the_tables_loses_nothing(world: World) -> None:
    ids = requests(4)
    world.commit(ids)
    feed = world.feed(max_passes=1)
    read_added, calls = world.tables.read_added, []

    def fails(name: str, *rest: object) -> object:
        calls.append(name)
        if len(calls) in (1, 3):
            raise TableError(f"table {name}: gone")
        return read_added(name, *rest)  # type: ignore[arg-type]

    world.tables.read_added = fails  # type: ignore[method-assign, assignment]
    for _ in range(2):
        with pytest.raises(TableError):
            feed.poll()
    feed.poll()
    windows = feed.next()
    assert names(windows) == ids
    assert all(len(w.branches) == 3 for w in windows)


def test_other_tables_than_before_are_refused_with_the_setting_to_change(world: World, tmp_path: Path) -> None:
    world.commit(requests(4))
    state = world.feed().state().model_copy(update={"cursor": 9})
    feed = world.feed()
    feed.cursor = state.cursor
    with pytest.raises(FeedError, match=r"tables\.uri .* train\.dir"):
        feed.poll()


def forget(world: World, version: int) -> None:
    """Say in both tables what maintenance says before it deletes what earlier versions added."""
    mark = CommitProperties(app_transactions=[Transaction(OLDEST, version)])
    for name in ("accepted", "rejected"):
        nothing = TABLES[name].empty_table()
        write_deltalake(world.tables.open(name), nothing, mode="append", commit_properties=mark)


def test_a_feed_that_comes_too_late_passes_over_what_is_gone_and_counts_it(world: World) -> None:
    ids = requests(6)
    for request in ids:
        world.commit([request])
    forget(world, 4)
    feed = world.feed(windows_per_step=1, replay_per_step=0, max_passes=1)
    assert drain(feed) == [[ids[4]], [ids[5]]]
    assert feed.counts["versions_gone"] == 4
    assert feed.counts["branches"] == 6


def test_a_restart_goes_on_without_the_windows_that_are_gone(world: World) -> None:
    ids = requests(6)
    for request in ids:
        world.commit([request])
    feed = world.feed(windows_per_step=2, replay_per_step=0, max_passes=1)
    feed.poll()
    feed.next()
    state = as_json(feed)
    assert state.needs == {"accepted": 0, "rejected": 0}
    forget(world, 3)
    restored = world.feed(windows_per_step=2, replay_per_step=0, max_passes=1)
    restored.restore(state)
    assert restored.counts["gone"] == 3
    assert restored.counts["versions_gone"] == 3
    assert drain(restored) == [[ids[3], ids[4]]]
