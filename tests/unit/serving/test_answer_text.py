"""Tokens are reported with their text: each once, in order, and none that a stop string cuts away."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from echo_engine import byte_tokenizer, encode
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engines.base import TokenLogprobs
from serving.http.detokenizer import AnswerText, Detokenizer, ScoredToken, TextDelta, TokenSpeller, join_deltas

TOKENIZER = byte_tokenizer()
SPELLER = TokenSpeller(TOKENIZER)
TEXTS = st.text(st.sampled_from("ab ß✓🙂"), max_size=24)
STOPS = st.lists(st.text(st.sampled_from("ab ß✓🙂"), min_size=1, max_size=3), max_size=2)


def scored(tokens: Sequence[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs(-float(token), ()) for token in tokens]


def feed_all(ids: Sequence[int], stops: Sequence[str], per_verify_step: int) -> tuple[list[TextDelta], AnswerText]:
    answer = AnswerText(Detokenizer(TOKENIZER), stops)
    verify_steps = [ids[i : i + per_verify_step] for i in range(0, len(ids), per_verify_step)]
    return [*(answer.feed(ids, scored(ids)) for ids in verify_steps), answer.finish()], answer


def spell_all(tokens: Sequence[ScoredToken]) -> bytes:
    return b"".join(SPELLER.spell(token.id).bytes or b"" for token in tokens)


@settings(deadline=None)
@given(text=TEXTS, stops=STOPS, per_verify_step=st.integers(1, 5))
def test_the_reported_tokens_always_spell_the_shown_text(text: str, stops: list[str], per_verify_step: int) -> None:
    deltas, _ = feed_all(encode(TOKENIZER, text), stops, per_verify_step)
    for end in range(len(deltas) + 1):
        so_far = join_deltas(deltas[:end])
        assert spell_all(so_far.tokens) == so_far.text.encode()


@settings(deadline=None)
@given(text=TEXTS, stops=STOPS, per_verify_step=st.integers(1, 5))
def test_tokens_keep_their_order_their_scores_and_their_offsets(
    text: str, stops: list[str], per_verify_step: int
) -> None:
    ids = encode(TOKENIZER, text)
    deltas, answer = feed_all(ids, stops, per_verify_step)
    tokens = join_deltas(deltas).tokens
    assert [token.id for token in tokens] == list(ids[: len(tokens)])
    assert all(token.score.logprob == -token.id for token in tokens)
    assert [token.offset for token in tokens] == [len(_whole(ids[:i])) for i in range(len(tokens))]
    if not answer.stopped:
        assert len(tokens) == len(ids) == answer.count


@pytest.mark.parametrize(("minimum", "shown"), [(0, "b"), (1, "b"), (2, "bab"), (3, "bab"), (4, "babab"), (9, "babab")])
def test_a_stop_string_counts_in_the_text_after_the_minimum_of_tokens(minimum: int, shown: str) -> None:
    answer = AnswerText(Detokenizer(TOKENIZER), ["a"], minimum)
    assert join_deltas([answer.feed(encode(TOKENIZER, "babab")), answer.finish()]).text == shown


def _whole(ids: Sequence[int]) -> str:
    raw = b"".join(SPELLER.spell(token).bytes or b"" for token in ids)
    return raw.decode(errors="ignore")


@settings(deadline=None)
@given(text=TEXTS, stops=STOPS, per_verify_step=st.integers(1, 5))
def test_scores_do_not_change_the_text(text: str, stops: list[str], per_verify_step: int) -> None:
    ids = encode(TOKENIZER, text)
    bare = AnswerText(Detokenizer(TOKENIZER), stops)
    shown = [bare.feed(ids[i : i + per_verify_step]) for i in range(0, len(ids), per_verify_step)]
    deltas, with_scores = feed_all(ids, stops, per_verify_step)
    assert join_deltas([*shown, bare.finish()]).text == join_deltas(deltas).text
    assert (bare.stopped, bare.count) == (with_scores.stopped, with_scores.count)


@pytest.mark.parametrize("per_verify_step", [1, 2, 5, 50])
def test_the_count_ends_with_the_token_that_completes_the_stop_string(per_verify_step: int) -> None:
    _, answer = feed_all(encode(TOKENIZER, "one two three"), ["tw"], per_verify_step)
    assert answer.count == len("one tw")


def test_a_special_token_is_reported_with_the_next_text_or_the_end() -> None:
    eos = TOKENIZER.eos_token_id
    answer = AnswerText(Detokenizer(TOKENIZER), [])
    ids = [*encode(TOKENIZER, "a"), eos, *encode(TOKENIZER, "b"), eos]
    deltas = [answer.feed([token], scored([token])) for token in ids]
    assert [(p.text, [t.id for t in p.tokens]) for p in [*deltas, answer.finish()]] == [
        ("a", [ids[0]]),
        ("", []),
        ("b", [eos, ids[2]]),
        ("", []),
        ("", [eos]),
    ]


def test_a_token_that_a_stop_string_cuts_is_reported_and_later_ones_are_not() -> None:
    wide = byte_tokenizer(extra=["\u0120two"])
    space_two = len(wide) - 1
    ids = [*encode(wide, "one"), space_two, *encode(wide, " three")]
    answer = AnswerText(Detokenizer(wide), ["two t"])
    delta = join_deltas([answer.feed(ids, scored(ids)), answer.finish()])
    assert (delta.text, [t.id for t in delta.tokens]) == ("one ", ids[:4])
    assert answer.count == len("one") + 1 + len(" t")


def test_a_wrong_number_of_scores_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        AnswerText(Detokenizer(TOKENIZER), []).feed([1, 2], scored([1]))
