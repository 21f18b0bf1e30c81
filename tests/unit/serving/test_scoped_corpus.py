"""A request is drafted from the answers of its scope, within a bound of bytes and for a bounded time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.settings.sections import SuffixScope
from schemas.suffix_corpus import BYTES_PER_TOKEN, Match
from serving.answers.scoped_corpus import ScopedCorpus

MAX_BYTES = 1000 * BYTES_PER_TOKEN
ANSWER = [5, 6, 7]
RETENTION_S = 640.0


class Clock:
    """Monotonic seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def corpus_of(scope: SuffixScope = "fleet", max_bytes: int = MAX_BYTES, clock: Clock | None = None) -> ScopedCorpus:
    return ScopedCorpus(scope, max_bytes, RETENTION_S, clock or Clock())


def array(tokens: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(tokens, np.int32)


@pytest.mark.parametrize("is_offered", [False, True], ids=["own", "of another node"])
@pytest.mark.parametrize(
    ("scope", "of", "found_by"),
    [
        ("request", "a", set()),
        ("request", None, set()),
        ("label", "a", {"a"}),
        ("label", "", {""}),
        ("label", None, set()),
        ("node", "a", {"a", "b", "", None}),
        ("fleet", None, {"a", "b", "", None}),
    ],
)
def test_a_scope_shares_an_answer_with_the_requests_it_names(
    scope: SuffixScope, of: str | None, found_by: set[str | None], is_offered: bool
) -> None:
    corpus = corpus_of(scope)
    if is_offered:
        corpus.offer([(of, array(ANSWER))])
        corpus.update(100)
    else:
        corpus.insert(of, ANSWER)
    assert {label for label in ("a", "b", "", None) if corpus.find(label, ANSWER[:2], 1).length} == found_by


def test_an_offered_answer_is_found_after_an_update() -> None:
    corpus = corpus_of()
    corpus.offer([(None, array(ANSWER))])
    assert corpus.is_due
    assert not corpus.find(None, ANSWER[:2], 1).length
    corpus.update(1)
    assert corpus.find(None, ANSWER[:2], 1) == Match(2, [[7]])


def test_an_update_inserts_whole_answers_up_to_its_bound_in_their_order() -> None:
    corpus = corpus_of()
    corpus.offer([(None, array([1, 2, n])) for n in range(10, 16)])
    corpus.update(4)
    assert corpus.find(None, [1, 2], 1) == Match(2, [[11], [10]])
    corpus.update(100)
    assert corpus.find(None, [1, 2], 1).continuations[0] == [15]


@given(
    answers=st.lists(st.tuples(st.booleans(), st.integers(0, 4000)), max_size=60),
    max_bytes=st.integers(1 << 16, 1 << 17),
)
def test_corpus_and_waiting_answers_stay_within_the_bound(answers: list[tuple[bool, int]], max_bytes: int) -> None:
    corpus = corpus_of(max_bytes=max_bytes)
    for is_offered, size in answers:
        if is_offered:
            corpus.offer([(None, np.arange(size, dtype=np.int32))])
        else:
            corpus.update(100)
        assert corpus.nbytes <= max_bytes


def test_of_too_many_waiting_answers_the_oldest_are_dropped_and_counted() -> None:
    corpus = corpus_of(max_bytes=1 << 16)
    corpus.offer([(None, array([1, 2, n])) for n in range(100)])
    while corpus.find(None, [1, 2], 1).continuations[:1] != [[99]]:
        assert corpus.is_due
        corpus.update(1)
    (overflowed,) = (m.samples[0].value for m in corpus.collect() if m.name == "aurora_serve_corpus_overflowed")
    assert 0 < overflowed < 100


def test_an_answer_is_forgotten_after_its_retention() -> None:
    clock = Clock()
    corpus = corpus_of(clock=clock)
    corpus.insert(None, [1, 2, 3])
    corpus.update(0)
    clock.now = RETENTION_S / 2
    corpus.insert(None, [4, 5, 6])
    corpus.update(0)
    clock.now = RETENTION_S
    assert corpus.is_due
    corpus.update(0)
    assert not corpus.find(None, [1, 2], 1).length
    assert corpus.find(None, [4, 5], 1) == Match(2, [[6]])
    assert corpus.num_tokens == 3
    clock.now = 2 * RETENTION_S
    corpus.update(0)
    assert corpus.num_tokens == 0
    assert not corpus.is_due


@given(gaps=st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_no_answer_outlives_its_retention_by_more_than_a_mark(gaps: list[int]) -> None:
    clock = Clock()
    corpus = corpus_of(max_bytes=100 * BYTES_PER_TOKEN * 2, clock=clock)
    times: dict[int, float] = {}
    for number, gap in enumerate(gaps):
        for _ in range(gap):
            clock.now += 1
            corpus.update(0)
        corpus.insert(None, [900, 901, number])
        times[number] = clock.now
        corpus.update(0)
        found = {n for [n, *_] in corpus.find(None, [900, 901], 1).continuations}
        assert all(clock.now - times[n] <= RETENTION_S * (1 + 1 / 64) + 1 for n in found)
        assert {n for n, at in times.items() if clock.now - at < RETENTION_S and n > number - 16} <= found


def test_a_scope_of_single_requests_takes_no_memory() -> None:
    corpus = corpus_of("request")
    corpus.offer([("a", array(ANSWER))])
    corpus.update(100)
    assert (corpus.nbytes, corpus.num_tokens, corpus.is_due) == (0, 0, False)
