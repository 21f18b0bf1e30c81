"""Occurrences, counts, eviction and bytes of the corpus equal those of a plain search through all of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.suffix_corpus import (
    BYTES_PER_TOKEN,
    END,
    MAX_LINKS,
    MAX_MATCH,
    MIN_MATCH,
    NO_MATCH,
    Match,
    SequenceHistory,
    SuffixCorpus,
    choose_longest,
    likeliest_chain,
)


class PlainCorpus:
    """The same ring as a list of tokens, searched from its newest entry to its oldest."""

    def __init__(self, capacity: int) -> None:
        self.ring = [END] * capacity
        self.numbers = [0] * capacity
        """Number of the answer that each entry belongs to."""
        self.inserted = self.next = 0

    def insert(self, tokens: Sequence[int]) -> None:
        answer = [*tokens[-(len(self.ring) - 1) :], END]
        if self.next + len(answer) > len(self.ring):
            self.ring[self.next :] = [END] * (len(self.ring) - self.next)
            self.next = 0
        self.ring[self.next : self.next + len(answer)] = answer
        self.numbers[self.next : self.next + len(answer)] = [self.inserted] * len(answer)
        self.inserted += 1
        self.next += len(answer)

    def forget(self, before: int) -> None:
        self.ring = [END if n < before else token for n, token in zip(self.numbers, self.ring, strict=True)]

    def find(self, tokens: Sequence[int], depth: int) -> Match:
        newest_first = [*reversed(range(self.next)), *reversed(range(self.next, len(self.ring)))]
        return plain_match(self.ring, newest_first, tokens, depth)


def plain_match(ring: Sequence[int], ends: Sequence[int], tokens: Sequence[int], depth: int) -> Match:
    for length in reversed(range(MIN_MATCH, min(MAX_MATCH, len(tokens)) + 1)):
        wanted = list(tokens[-length:])
        found = [end for end in ends if end + 1 >= length and list(ring[end + 1 - length : end + 1]) == wanted]
        if found:
            return Match(length, [until_end(ring[end + 1 : end + 1 + depth]) for end in found])
    return NO_MATCH


def until_end(tokens: Sequence[int]) -> list[int]:
    kept = list(tokens)
    return kept[: kept.index(END) + 1] if END in kept else kept


def phrases(vocabulary: int, max_size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, vocabulary - 1), max_size=max_size)


answers = st.lists(phrases(3, 14), max_size=12)


@given(
    answers=answers,
    capacity=st.integers(MIN_MATCH + 1, MAX_LINKS),
    queries=st.lists(phrases(3, 12), min_size=1, max_size=6),
    depth=st.integers(1, 6),
)
def test_every_match_equals_that_of_a_plain_search(
    answers: list[list[int]], capacity: int, queries: list[list[int]], depth: int
) -> None:
    corpus, plain = SuffixCorpus(capacity * BYTES_PER_TOKEN), PlainCorpus(capacity)
    for answer in [[], *answers]:
        corpus.insert(answer)
        plain.insert(answer)
        for query in [*queries, answer[:-1], answer]:
            assert corpus.find(query, depth) == plain.find(query, depth)


@given(answers=answers, capacity=st.integers(MIN_MATCH + 1, MAX_LINKS), data=st.data())
def test_forgotten_answers_are_not_found(answers: list[list[int]], capacity: int, data: st.DataObject) -> None:
    corpus, plain, written = SuffixCorpus(capacity * BYTES_PER_TOKEN), PlainCorpus(capacity), [0]
    for answer in answers:
        corpus.insert(answer)
        plain.insert(answer)
        written.append(corpus.written)
        if data.draw(st.booleans()):
            before = data.draw(st.integers(0, len(written) - 1))
            corpus.forget(written[before])
            plain.forget(before)
        assert corpus.num_tokens == sum(token != END for token in plain.ring)
        for query in answers:
            assert corpus.find(query, 3) == plain.find(query, 3)


@pytest.mark.parametrize("seed", range(4))
def test_matches_in_a_corpus_of_many_answers_equal_those_of_a_plain_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    corpus, plain = SuffixCorpus(1500 * BYTES_PER_TOKEN), PlainCorpus(1500)
    texts = [rng.integers(0, 60, rng.integers(0, 40)).tolist() for _ in range(100)]
    texts += [text[: len(text) // 2] for text in texts]
    for text in texts:
        corpus.insert(text)
        plain.insert(text)
    found = [corpus.find(text[: end + 1], 4) for text in texts for end in range(len(text))]
    assert found == [plain.find(text[: end + 1], 4) for text in texts for end in range(len(text))]
    assert {match.length for match in found} == {0, *range(MIN_MATCH, MAX_MATCH + 1)}


@given(answers=answers, max_bytes=st.integers((MIN_MATCH + 1) * BYTES_PER_TOKEN, 100 * BYTES_PER_TOKEN))
def test_the_bytes_are_bounded_and_constant(answers: list[list[int]], max_bytes: int) -> None:
    corpus = SuffixCorpus(max_bytes)
    before = corpus.nbytes
    for answer in answers:
        corpus.insert(answer)
    assert max_bytes - BYTES_PER_TOKEN < corpus.nbytes == before <= max_bytes


def test_a_bound_without_room_for_an_answer_is_rejected() -> None:
    with pytest.raises(ValueError, match="a corpus needs"):
        SuffixCorpus(MIN_MATCH * BYTES_PER_TOKEN)


def test_of_a_frequent_match_the_newest_occurrences_are_found() -> None:
    corpus = SuffixCorpus(1000 * BYTES_PER_TOKEN)
    for following in range(MAX_LINKS + 5):
        corpus.insert([998, 999, following])
    newest = range(MAX_LINKS + 4, 4, -1)
    assert corpus.find([998, 999], 2) == Match(2, [[following, END] for following in newest])


@given(
    answers=st.lists(st.tuples(st.integers(0, 2), phrases(3, 14)), max_size=12),
    capacity=st.integers(MIN_MATCH + 1, 60),
    queries=st.lists(phrases(3, 12), min_size=1, max_size=6),
)
def test_a_match_lies_in_answers_of_its_owner(
    answers: list[tuple[int, list[int]]], capacity: int, queries: list[list[int]]
) -> None:
    corpus = SuffixCorpus(capacity * BYTES_PER_TOKEN)
    for owner, answer in answers:
        corpus.insert(answer, owner)
    for owner in range(3):
        alone = SuffixCorpus(1000 * BYTES_PER_TOKEN)
        for of, answer in answers:
            if of == owner:
                alone.insert(answer)
        for query in [*queries, *(answer for _, answer in answers)]:
            found, wanted = corpus.find(query, 4, owner), alone.find(query, 4)
            assert found.length <= wanted.length
            if found.length == wanted.length:
                assert found.continuations == wanted.continuations[: len(found.continuations)]


def test_owners_that_share_buckets_do_not_share_answers() -> None:
    corpus = SuffixCorpus(100 * BYTES_PER_TOKEN)
    owners = [1, 1 + corpus.capacity]
    corpus.insert([5, 6, 7], owners[0])
    assert corpus.find([5, 6], 1, owners[0]) == Match(2, [[7]])
    assert corpus.find([5, 6], 1, owners[1]) == NO_MATCH


def test_ids_of_large_vocabularies_are_found() -> None:
    corpus = SuffixCorpus(100 * BYTES_PER_TOKEN)
    large = 2**31 - 1
    corpus.insert([large, large - 1, large - 2, 5])
    assert corpus.find([large, large - 1, large - 2], 1) == Match(3, [[5]])


@given(parts=st.lists(phrases(1, 10) | phrases(3, 20), min_size=1, max_size=5), depth=st.integers(1, 6))
def test_repeats_of_a_growing_sequence_equal_those_of_a_plain_search(parts: list[list[int]], depth: int) -> None:
    history, tokens = SequenceHistory(), [0]
    for part in parts:
        tokens += part
        wanted = plain_match(tokens, list(reversed(range(len(tokens) - 1))), tokens, depth)
        newest = wanted._replace(continuations=wanted.continuations[:MAX_LINKS])
        assert history.find(tokens, depth) == newest


def test_the_longer_match_is_chosen_and_equal_ones_are_joined() -> None:
    short, long, other = Match(2, [[1]]), Match(3, [[2]]), Match(3, [[3]])
    assert choose_longest(short, long) == choose_longest(long, short) == long
    assert choose_longest(long, other) == Match(3, [[2], [3]])
    assert choose_longest(NO_MATCH, short) == short


@pytest.mark.parametrize(
    ("continuations", "chain"),
    [
        ([], []),
        ([[5, 6]], [(5, 1 / 2), (6, 1 / 2)]),
        ([[5, 6], [7, 8], [7, 9]], [(7, 2 / 4), (8, 1 / 3)]),
        ([[7], [5, 6]], [(7, 1 / 3)]),
        ([[5, END], [5, 6], [5, 6]], [(5, 3 / 4), (6, 2 / 4)]),
        ([[5, END], [5, 6]], [(5, 2 / 3)]),
        ([[END]], []),
    ],
    ids=["none", "one", "frequency", "recency", "an answer that ended", "the newest ended", "ended"],
)
def test_a_chain_follows_frequency_then_recency(continuations: list[list[int]], chain: list[tuple[int, float]]) -> None:
    assert list(likeliest_chain(continuations)) == chain
