"""Which samples are held out, and what becomes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.held_out import RECENT, HeldOutSet, is_held_out
from trainer.data.samples import Sample, Teacher
from trainer.data.table_reader import TableEntry

RATIO = 0.5
DRAWN = [key for key in map(str, range(400)) if is_held_out(key, RATIO)]
NOTHING = torch.empty(0, 0)


class Arrival(NamedTuple):
    """A sample of the stream."""

    prompt: str
    label: str | None = None
    tokens: int = 0


class Stream:
    """A held-out set that is fed with samples, and what it gave to be trained on."""

    def __init__(self, capacity: int, max_bytes: int = 1 << 30) -> None:
        self.counts: Counter[str] = Counter()
        self.capacity, self.max_bytes = capacity, max_bytes
        self.set = HeldOutSet(RATIO, capacity, max_bytes, self.counts)
        self.arrived: list[TableEntry] = []
        self.trained: list[TableEntry] = []

    def feed(self, arrivals: Sequence[Arrival]) -> Stream:
        for arrival in arrivals:
            self.arrived.append(entry_of(arrival, len(self.arrived)))
            self.trained += self.set.add(self.arrived[-1])
        return self

    def restart(self) -> None:
        before = self.set
        self.set = HeldOutSet(RATIO, self.capacity, self.max_bytes, Counter())
        self.set.restore(list(before), before.left, before.recent_labels)

    @property
    def numbers(self) -> list[int]:
        return [entry.key[2] for entry in self.set]


def entry_of(arrival: Arrival, number: int) -> TableEntry:
    sample = Sample(
        request=f"request-{number}",
        tokens=torch.zeros(arrival.tokens, dtype=torch.int64),
        next_token=None,
        features=torch.zeros(arrival.tokens + 1, 8, dtype=torch.bfloat16)[1:],
        known=torch.zeros(arrival.tokens, dtype=torch.bool),
        teacher=Teacher(NOTHING, NOTHING),
        label=arrival.label,
        prompt_key=arrival.prompt,
    )
    return TableEntry(sample=sample, key=("traces", 0, number, number, 0), drafted_by=0, after=(number, number))


def prompts(entries: Sequence[TableEntry]) -> set[str]:
    return {entry.sample.prompt_key for entry in entries}


LABELS = (None, "code", "math", "sql")
arrivals = st.lists(
    st.builds(Arrival, st.sampled_from([*DRAWN[:12], "trained"]), st.sampled_from(LABELS), st.just(0)), max_size=60
)
capacities = st.integers(1, 24)


@settings(deadline=None)
@given(arrivals, capacities)
def test_every_sample_is_held_out_trained_on_or_skipped_and_no_prompt_is_on_both_sides(
    stream: list[Arrival], capacity: int
) -> None:
    fed = Stream(capacity)
    for arrival in stream:
        fed.feed([arrival])
        held_out = list(fed.set)
        assert len(held_out) <= capacity
        assert not prompts(held_out) & prompts(fed.trained)
        assert len(held_out) + len(fed.trained) + fed.counts["samples_skipped_held_out"] == len(fed.arrived)
    assert (
        len({entry.key for entry in [*fed.set, *fed.trained]})
        == len(fed.arrived) - fed.counts["samples_skipped_held_out"]
    )


@settings(deadline=None)
@given(arrivals, arrivals, capacities)
def test_a_restart_and_a_replay_give_the_same_set(before: list[Arrival], after: list[Arrival], capacity: int) -> None:
    restarted, replayed = Stream(capacity).feed(before), Stream(capacity).feed([*before, *after])
    restarted.restart()
    restarted.feed(after)
    assert restarted.numbers == replayed.numbers
    assert restarted.set.left == replayed.set.left
    assert [entry.key for entry in restarted.trained] == [entry.key for entry in replayed.trained]


def test_a_restart_with_a_smaller_set_trains_on_the_rest() -> None:
    fed = Stream(16).feed([Arrival(DRAWN[0]), Arrival(DRAWN[0]), Arrival(DRAWN[1]), Arrival(DRAWN[1])])
    fed.capacity = 1
    fed.restart()
    fed.feed([Arrival(DRAWN[1]), Arrival(DRAWN[2])])
    assert fed.numbers == [5]
    assert prompts(fed.trained) == set(DRAWN[:2])


def test_the_prompt_that_was_seen_longest_ago_leaves_with_all_of_its_samples() -> None:
    first, second, *newer = DRAWN[:18]
    fed = Stream(16).feed([Arrival(key) for key in (first, second, first, *newer[:13])])
    assert fed.trained == []
    fed.feed([Arrival(newer[13])])
    assert [entry.key[2] for entry in fed.trained] == [1], "the first prompt returned after the second one"
    fed.feed([Arrival(newer[14])])
    assert [entry.key[2] for entry in fed.trained] == [1, 0, 2]


def test_requests_with_a_prompt_that_left_are_trained_on() -> None:
    fed = Stream(1).feed([Arrival(DRAWN[0]), Arrival(DRAWN[1]), Arrival(DRAWN[0])])
    assert [entry.key[2] for entry in fed.trained] == [0, 2]
    assert fed.numbers == [1]


def test_a_prompt_that_keeps_returning_holds_an_eighth_of_the_set() -> None:
    fed = Stream(16).feed([Arrival(DRAWN[0])] * 9 + [Arrival(DRAWN[1])])
    assert fed.numbers == [7, 8, 9]
    assert fed.trained == []
    assert fed.counts["samples_skipped_held_out"] == 7


@settings(deadline=None)
@given(st.lists(st.sampled_from(LABELS), max_size=48), st.integers(12, 24))
def test_every_label_keeps_its_newest_prompts_up_to_an_equal_share(labels: list[str | None], capacity: int) -> None:
    fed = Stream(capacity).feed([Arrival(key, label) for key, label in zip(DRAWN, labels, strict=False)])
    share = capacity // max(len(set(labels)), 1)
    held_out: dict[str | None, list[int]] = {label: [] for label in labels}
    for entry in fed.set:
        held_out[entry.sample.label].append(entry.key[2])
    for label, numbers in held_out.items():
        arrived = [number for number, one in enumerate(labels) if one == label]
        assert len(numbers) >= min(share, len(arrived))
        assert numbers == arrived[len(arrived) - len(numbers) :]
    assert sum(map(len, held_out.values())) == min(capacity, len(labels))


def test_a_label_that_recent_traffic_does_not_contain_leaves() -> None:
    capacity = 8
    code = Arrival(next(key for key in map(str, range(400)) if key not in DRAWN), "code")
    fed = Stream(capacity).feed([Arrival(DRAWN[0], "math")])
    fed.feed([code] * (RECENT * capacity - 1))
    assert fed.numbers == [0]
    fed.feed([code])
    assert fed.numbers == []
    assert fed.trained[-1].key[2] == 0


@settings(deadline=None)
@given(arrivals, capacities)
def test_weighted_samples_have_the_shares_of_recent_traffic(stream: list[Arrival], capacity: int) -> None:
    fed = Stream(capacity).feed(stream)
    recent = [arrival.label for arrival in stream[-RECENT * capacity :]]
    held = [entry.sample.label for entry in fed.set]
    assert fed.set.weights.keys() == set(held)
    for label, weight in fed.set.weights.items():
        assert weight * held.count(label) / len(held) == pytest.approx(recent.count(label) / len(recent))


sized = st.lists(
    st.builds(Arrival, st.sampled_from(DRAWN[:12]), st.sampled_from(LABELS), st.integers(0, 40)), max_size=40
)


@settings(deadline=None)
@given(sized, st.integers(0, 4096))
def test_the_samples_of_the_set_have_at_most_its_bytes(stream: list[Arrival], max_bytes: int) -> None:
    fed = Stream(16, max_bytes)
    for arrival in stream:
        fed.feed([arrival])
        sizes = [
            sum(tensor.untyped_storage().nbytes() for tensor in (one.tokens, one.features, one.known)) + len(one)
            for one in (entry.sample for entry in fed.set)
        ]
        assert fed.set.bytes == sum(sizes) <= max_bytes
    assert len(list(fed.set)) + len(fed.trained) + fed.counts["samples_skipped_held_out"] == len(stream)


def test_prompts_leave_a_set_that_is_full_in_bytes_as_one_that_is_full_in_samples() -> None:
    by_bytes, by_samples = Stream(16, max_bytes=4 * 260), Stream(4)
    for fed in (by_bytes, by_samples):
        fed.feed([Arrival(key, "code" if n % 3 else "math", tokens=10) for n, key in enumerate(DRAWN[:12])])
    assert by_bytes.numbers == by_samples.numbers
    assert len(by_bytes.numbers) == 4
