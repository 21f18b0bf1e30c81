"""The draft vocabulary by counts: which ids are chosen, what they cover, and when another vocabulary is proposed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import UserError
from trainer.data import draft_vocabulary
from trainer.data.draft_vocabulary import (
    MIN_GAIN,
    Halves,
    TokenCounts,
    VocabularyProposal,
    choose_ids,
    coverage,
    propose_vocabulary,
    share_covered,
    special_ids,
    sum_halves,
)

TOTAL, SIZE = 60, 12
KEPT = (0, 50)
COUNTS = st.dictionaries(st.integers(0, TOTAL - 1), st.integers(0, 30), max_size=TOTAL)
HALVES = st.tuples(COUNTS, COUNTS)
VOCABULARIES = st.sets(st.integers(0, TOTAL - 1), min_size=SIZE, max_size=SIZE)


def propose(
    halves: Halves, current: set[int] | range, min_coverage: float = 0.95, min_tokens: int = 1
) -> VocabularyProposal | None:
    return propose_vocabulary(halves, current, KEPT, TOTAL, min_coverage=min_coverage, min_tokens=min_tokens)


def test_special_ids_come_first_then_frequent_then_lowest_ids() -> None:
    counts = {30: 5, 12: 9, 41: 5, 2: 1}
    assert choose_ids(counts, [0, 50], 4, 60) == [0, 12, 30, 50]
    assert choose_ids(counts, [0, 50], 8, 60) == [0, 1, 2, 3, 12, 30, 41, 50]
    assert choose_ids(counts, [0, 12], 4, 60) == [0, 12, 30, 41]
    assert choose_ids(counts, [], 99, 60) == list(range(60))
    with pytest.raises(UserError, match="3 special tokens, so --size"):
        choose_ids(counts, [1, 2, 3], 2, 60)


def test_coverage_is_the_share_of_output_tokens_in_the_vocabulary() -> None:
    halves = {40: 6, 1: 2}, {40: 3, 50: 5, 1: 4}
    ids = choose_ids({40: 9, 50: 5, 1: 6}, [0], 3, 60)
    assert ids == [0, 1, 40]
    result = coverage(halves, [0], ids, 60)
    # The first half chooses 0 1 40 and the second 0 1 50: of the other halves that is 7 of 12, and 2 of 8.
    assert (result.tokens, result.chosen, result.lowest, result.unseen) == (20, 15 / 20, 6 / 20, 9 / 20)


def test_special_ids_come_from_the_targets_files(tmp_path: Path) -> None:
    def put(name: str, content: object) -> None:
        (tmp_path / name).write_text(json.dumps(content))

    put("config.json", {"eos_token_id": 9})
    assert special_ids(tmp_path, 60) == [9]
    put("generation_config.json", {"eos_token_id": [10, 11]})
    put("tokenizer.json", {"added_tokens": [{"id": 3, "special": True}, {"id": 4, "special": False}]})
    put("tokenizer_config.json", {"added_tokens_decoder": {"5": {"special": True}, "6": {}, "70": {"special": True}}})
    assert special_ids(tmp_path, 60) == [3, 5, 9, 10, 11]


def test_tokens_of_the_current_vocabulary_stay_among_equals() -> None:
    counts = {30: 5, 12: 5, 41: 5}
    assert choose_ids(counts, [], 2, 60) == [12, 30]
    assert choose_ids(counts, [], 2, 60, current=[7, 41]) == [12, 41]
    assert choose_ids(counts, [], 6, 60, current=[7, 41, 59]) == [0, 7, 12, 30, 41, 59]


@given(COUNTS, VOCABULARIES)
def test_a_choice_equals_a_plain_ranking_of_all_ids(counts: dict[int, int], current: set[int]) -> None:
    others = set(range(TOTAL)) - set(KEPT)
    ranked = sorted(others, key=lambda token: (-counts.get(token, 0), token not in current, token))
    expected = sorted([*KEPT, *ranked[: SIZE - len(KEPT)]])
    assert choose_ids(counts, KEPT, SIZE, TOTAL, current) == expected
    assert choose_ids(dict(reversed(counts.items())), KEPT, SIZE, TOTAL, current) == expected


@given(HALVES, VOCABULARIES, st.floats(0, 0.99), st.integers(1, 300))
def test_a_proposal_has_the_size_keeps_special_tokens_and_covers_more(
    halves: Halves, current: set[int], min_coverage: float, min_tokens: int
) -> None:
    counts = sum_halves(halves)
    proposal = propose(halves, current, min_coverage, min_tokens)
    if proposal is None:
        return
    assert sum(counts.values()) >= min_tokens
    assert share_covered(counts, current) < min_coverage
    assert proposal.coverage >= share_covered(counts, current) + MIN_GAIN
    assert (len(set(proposal.ids)), list(proposal.ids)) == (SIZE, sorted(proposal.ids))
    assert set(KEPT) <= set(proposal.ids) <= set(range(TOTAL))


@given(HALVES, VOCABULARIES)
def test_what_was_proposed_is_not_replaced_on_the_same_traffic(halves: Halves, current: set[int]) -> None:
    proposal = propose(halves, current, 0.99)
    if proposal is not None:
        assert propose(halves, set(proposal.ids), 0.99) is None


def test_a_vocabulary_that_misses_much_is_replaced() -> None:
    halves = {40: 50, 41: 30, 1: 20}, {40: 55, 41: 25, 2: 20}
    proposal = propose(halves, range(SIZE))
    assert proposal is not None
    assert {40, 41, *KEPT} <= set(proposal.ids)
    assert proposal.coverage == 1.0


@pytest.mark.parametrize(
    ("halves", "why"),
    [
        (({1: 96, 40: 4}, {1: 97, 40: 3}), "it covers enough"),
        (({1: 1, 40: 9}, {1: 1, 40: 8}), "too few tokens are counted"),
        (({40 + i: 10 for i in range(10)}, {20 + i: 10 for i in range(10)}), "what one half chooses misses the other"),
        (({i: 100 if i < SIZE else 1 for i in range(TOTAL)},) * 2, "the best one covers as much"),
    ],
)
def test_a_vocabulary_stays_where(halves: Halves, why: str) -> None:
    assert propose(halves, range(SIZE), min_tokens=50) is None, why


def test_more_special_tokens_than_ids_and_a_threshold_of_zero_keep_the_vocabulary() -> None:
    halves = {40: 100}, {40: 100}
    assert propose_vocabulary(halves, range(4), range(20, 30), 60, min_coverage=0.95, min_tokens=1) is None
    assert propose(halves, range(SIZE), min_coverage=0.0) is None
    assert propose(({}, {}), range(SIZE)) is None


def test_parts_of_a_request_count_in_one_half() -> None:
    counts = TokenCounts()
    for number in range(40):
        counts.add(f"request-{number}", [number])
        counts.add(f"request-{number}", [number, number])
    one, other = counts.halves
    assert min(len(one), len(other)) > 8
    assert one.keys().isdisjoint(other)
    assert set((one | other).values()) == {3}
    assert (counts.tokens, TokenCounts(counts.halves).tokens) == (120, 120)


def test_older_tokens_count_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_vocabulary, "MAX_COUNTED", 64)
    counts = TokenCounts()
    for _ in range(40):
        counts.add("old", [7] * 8)
    for _ in range(16):
        counts.add("new", [9] * 8)
        assert counts.tokens == Counter(sum_halves(counts.halves)).total() < 64
    summed = sum_halves(counts.halves)
    assert summed.get(7, 0) * 4 < summed[9], "half of the memory is the newest traffic, half of the rest before it"
