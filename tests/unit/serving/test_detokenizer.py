"""Detokenization: whole characters, no stop strings, no lost text; and the spelling of single tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
from echo_engine import byte_tokenizer, encode
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from serving.http.detokenizer import Detokenizer, StopScanner, TokenSpeller

TOKENIZER = byte_tokenizer()
WORDS = ["\u2581the", "\u2581cat", "s", "<0xF0>", "<0x41>", "\ufffd"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a vocabulary in SentencePiece's notation: words with the space before them, and bytes."""
    tokenizer = Tokenizer(models.WordLevel(vocab={word: i for i, word in enumerate(WORDS)}, unk_token="s"))
    metaspace = decoders.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def deltas(text: str, per_verify_step: int) -> list[str]:
    ids = encode(TOKENIZER, text)
    detokenizer = Detokenizer(TOKENIZER)
    fed = [detokenizer.feed(ids[i : i + per_verify_step]) for i in range(0, len(ids), per_verify_step)]
    return [*fed, detokenizer.finish()]


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), per_verify_step=st.integers(1, 5))
def test_the_deltas_add_up_to_the_text(text: str, per_verify_step: int) -> None:
    assert "".join(deltas(text, per_verify_step)) == text


@settings(deadline=None)
@given(text=st.text(st.sampled_from("aß✓🙂"), max_size=20), per_verify_step=st.integers(1, 3))
def test_no_delta_has_half_a_character(text: str, per_verify_step: int) -> None:
    assert not any("\ufffd" in delta for delta in deltas(text, per_verify_step))


def test_an_incomplete_character_becomes_one_replacement_character() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.feed([*encode(TOKENIZER, "a"), *encode(TOKENIZER, "🙂")[:2]]) == ""
    assert detokenizer.finish() == "a\ufffd"


def test_special_tokens_have_no_text() -> None:
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
def test_the_beginning_of_a_stop_string_is_kept_back_only_while_it_may_be_one(text: str, shown: str) -> None:
    scanner = StopScanner(["\nUser:"])
    assert "".join(scanner.feed(c) for c in text) + scanner.finish() == shown


def test_without_stop_strings_no_text_is_kept_back() -> None:
    assert StopScanner([]).feed("abc") == "abc"


def test_the_space_before_the_first_word_depends_on_the_text_before() -> None:
    tokenizer = word_tokenizer()
    assert Detokenizer(tokenizer).feed([1, 2]) == "cats"
    assert Detokenizer(tokenizer, before=[0]).feed([1, 2]) == " cats"


def test_the_text_before_the_answer_is_not_repeated() -> None:
    detokenizer = Detokenizer(TOKENIZER, before=encode(TOKENIZER, "grüße"))
    assert [detokenizer.feed([token]) for token in encode(TOKENIZER, " ✓!")] == [" ", "", "", "✓", "!"]
    assert detokenizer.finish() == ""


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_the_bytes_of_the_tokens_are_those_of_the_text(text: str) -> None:
    speller = TokenSpeller(TOKENIZER)
    assert b"".join(speller.spell(token).bytes or b"" for token in encode(TOKENIZER, text)) == text.encode()


def test_a_token_is_spelled_as_text_and_bytes() -> None:
    speller = TokenSpeller(TOKENIZER)
    letter, first_of_four = encode(TOKENIZER, "a")[0], encode(TOKENIZER, "🙂")[0]
    assert (speller.spell(letter).text, speller.spell(letter).bytes) == ("a", b"a")
    assert (speller.spell(first_of_four).text, speller.spell(first_of_four).bytes) == (None, b"\xf0")
    special = speller.spell(TOKENIZER.eos_token_id)
    assert (special.text, special.bytes) == ("<eos>", None)


def test_words_are_spelled_with_their_space_and_bytes_as_bytes() -> None:
    speller = TokenSpeller(word_tokenizer())
    spelled = [(s.text, s.bytes) for s in (speller.spell(token) for token in range(len(WORDS)))]
    assert spelled == [
        (" the", b" the"),
        (" cat", b" cat"),
        ("s", b"s"),
        (None, b"\xf0"),
        ("A", b"A"),
        ("\ufffd", "\ufffd".encode()),
    ]
