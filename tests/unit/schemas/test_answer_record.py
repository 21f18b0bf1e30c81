"""An answer record is read back as it was written, has a bounded size, and damage never raises another error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import answers
from schemas.answers import (
    MAX_RECORD_BYTES,
    MAX_TEXT_BYTES,
    MAX_TOKENS,
    PROMPT_TOKENS,
    Answer,
    AnswerError,
    cut_answer,
    decode,
    encode,
)
from schemas.suffix_corpus import MAX_MATCH

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_TEXT_BYTES // 4)
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=40) | st.lists(st.integers(0, 2**16 - 1), max_size=40)


@st.composite
def made(draw: st.DrawFn) -> Answer:
    ids = draw(tokens)
    return Answer(
        draw(texts),
        draw(texts),
        draw(texts),
        draw(st.none() | texts),
        draw(st.integers(-(2**63), 2**63 - 1)),
        draw(st.integers(0, min(len(ids), PROMPT_TOKENS))),
        np.array(ids, np.int32),
    )


SMALL = Answer("line", "node", "r-1", "math", 5, 2, np.array([1, 2, 3], np.int32))


def fields(answer: Answer) -> tuple[object, ...]:
    return (
        answer.line,
        answer.node,
        answer.request,
        answer.label,
        answer.time_us,
        answer.prompt_tokens,
        answer.tokens.tolist(),
    )


@given(made())
def test_an_answer_is_read_back_as_it_was_written(answer: Answer) -> None:
    record = encode(answer)
    assert fields(decode(record)) == fields(answer)
    assert len(record) <= MAX_RECORD_BYTES


@given(made(), st.data())
def test_a_damaged_record_is_an_answer_or_an_error_of_its_own(answer: Answer, data: st.DataObject) -> None:
    record = bytearray(encode(answer))
    for _ in range(data.draw(st.integers(0, 4))):
        record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(record[: data.draw(st.integers(0, len(record)))])
    try:
        found = decode(cut)
    except AnswerError:
        return
    assert found.tokens.dtype == np.int32
    assert not len(found.tokens) or found.tokens.min() >= 0
    assert found.prompt_tokens <= min(len(found.tokens), PROMPT_TOKENS)


@given(st.binary(max_size=80))
def test_random_bytes_are_an_answer_or_an_error_of_its_own(record: bytes) -> None:
    try:
        decode(record)
    except AnswerError:
        return


@pytest.mark.parametrize(("highest", "width"), [(2**16 - 1, 2), (2**16, 4)])
def test_a_token_takes_two_bytes_where_the_vocabulary_allows_it(highest: int, width: int) -> None:
    one, two = (replace(SMALL, tokens=np.full(n, highest, np.int32)) for n in (3, 4))
    assert len(encode(two)) - len(encode(one)) == width


def test_the_largest_record_has_the_documented_size() -> None:
    text = "x" * MAX_TEXT_BYTES
    largest = Answer(text, text, text, text, 0, 8, np.full(MAX_TOKENS, 2**31 - 1, np.int32))
    assert len(encode(largest)) == MAX_RECORD_BYTES


@pytest.mark.parametrize(
    "changed",
    [
        {"label": "x" * (MAX_TEXT_BYTES + 1)},
        {"label": "\ud800"},
        {"prompt_tokens": 4},
        {"prompt_tokens": -1},
        {"prompt_tokens": PROMPT_TOKENS + 1, "tokens": np.zeros(20, np.int32)},
        {"tokens": np.zeros(MAX_TOKENS + 1, np.int32)},
        {"tokens": np.array([3, -1], np.int32)},
        {"time_us": 2**63},
    ],
)
def test_an_answer_out_of_bounds_is_not_encoded(changed: dict[str, object]) -> None:
    with pytest.raises(AnswerError):
        encode(replace(SMALL, **changed))  # type: ignore[arg-type]


def test_a_record_of_another_format_is_rejected() -> None:
    record = bytearray(encode(SMALL))
    record[0] = answers.FORMAT + 1
    with pytest.raises(AnswerError, match="format 2"):
        decode(bytes(record))


@pytest.mark.parametrize("prompt_tokens", [4, PROMPT_TOKENS + 1, 255])
def test_a_record_with_more_prompt_tokens_than_tokens_is_rejected(prompt_tokens: int) -> None:
    record = bytearray(encode(replace(SMALL, tokens=np.arange(3 if prompt_tokens == 4 else 300, dtype=np.int32))))
    record[2] = prompt_tokens
    with pytest.raises(AnswerError, match="prompt tokens"):
        decode(bytes(record))


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_record_cut_within_its_texts_is_rejected(cut: int) -> None:
    record = encode(SMALL)
    with pytest.raises(AnswerError):
        decode(record[:cut])


@given(
    prompt=st.lists(st.integers(0, 9), max_size=20),
    output=st.lists(st.integers(10, 19), max_size=20),
)
def test_the_end_of_the_prompt_precedes_the_answer(prompt: list[int], output: list[int]) -> None:
    count, ids = cut_answer(prompt, output)
    assert ids[:count].tolist() == prompt[len(prompt) - count :]
    assert ids[count:].tolist() == output
    assert count == min(len(prompt), PROMPT_TOKENS)


def test_of_an_answer_beyond_the_maximum_the_end_is_kept() -> None:
    count, ids = cut_answer([1], range(MAX_TOKENS + 5))
    assert (count, len(ids), ids[-1]) == (0, MAX_TOKENS, MAX_TOKENS + 4)


def test_a_record_has_as_many_prompt_tokens_as_the_longest_match() -> None:
    assert PROMPT_TOKENS == MAX_MATCH
