"""Answers become text piece by piece: no half characters, no stop strings, nothing lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from echo_engine import byte_tokenizer, encode
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.text import Detokenizer, StopScanner

TOKENIZER = byte_tokenizer()


def pieces(text: str, per_round: int) -> list[str]:
    ids = encode(TOKENIZER, text)
    detokenizer = Detokenizer(TOKENIZER)
    fed = [detokenizer.feed(ids[i : i + per_round]) for i in range(0, len(ids), per_round)]
    return [*fed, detokenizer.finish()]


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), per_round=st.integers(1, 5))
def test_the_pieces_are_the_text(text: str, per_round: int) -> None:
    assert "".join(pieces(text, per_round)) == text


@settings(deadline=None)
@given(text=st.text(st.sampled_from("aß✓🙂"), max_size=20), per_round=st.integers(1, 3))
def test_no_piece_holds_half_a_character(text: str, per_round: int) -> None:
    assert not any("\ufffd" in piece for piece in pieces(text, per_round))


def test_a_character_that_is_never_finished_shows_as_one_replacement() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.feed([*encode(TOKENIZER, "a"), *encode(TOKENIZER, "🙂")[:2]]) == ""
    assert detokenizer.finish() == "a\ufffd"


def test_special_tokens_give_no_text() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    ids = [*encode(TOKENIZER, "ab"), TOKENIZER.eos_token_id]
    assert (detokenizer.feed(ids), detokenizer.finish()) == ("ab", "")


@given(
    text=st.text(st.sampled_from("abc"), max_size=30),
    stops=st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_the_shown_text_ends_before_the_first_stop_string_however_it_arrives(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    scanner = StopScanner(stops)
    bounds = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    shown = ""
    for start, end in pairwise(bounds):
        shown += scanner.feed(text[start:end])
        assert not any(stop in shown for stop in stops)
    shown += scanner.finish()
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert scanner.stopped == bool(ends)
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert len(shown) >= min(start for _, start in ends)


@pytest.mark.parametrize(("text", "shown"), [("one\nUser: two", "one"), ("one\nUse", "one\nUse"), ("\nUser:", "")])
def test_a_stop_string_is_cut_and_its_beginning_held_back_only_while_it_may_be_one(text: str, shown: str) -> None:
    scanner = StopScanner(["\nUser:"])
    assert "".join(scanner.feed(c) for c in text) + scanner.finish() == shown


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopScanner([]).feed("abc") == "abc"
