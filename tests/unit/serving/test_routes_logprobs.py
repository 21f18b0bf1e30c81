"""Log-probabilities in OpenAI's formats, whole and streamed; the echo engine gives every token -0.5."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api_node import Node, running_node
from echo_engine import BYTES, byte_tokenizer, encode

from serving.engines.base import TokenLogprobs
from serving.http.detokenizer import TokenSpeller

TOKENIZER = byte_tokenizer()


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node() as node:
        yield node


def test_every_token_of_a_chat_answer_has_its_logprob_and_the_top_logprobs(node: Node) -> None:
    answer = node.ask("grüße 🙂", logprobs=True, top_logprobs=3)
    tokens = answer.choices[0].logprobs.content
    ids = encode(TOKENIZER, "grüße 🙂")
    assert node.engine.requests[0].logprobs == 3
    assert bytes(byte for token in tokens for byte in token.bytes) == "grüße 🙂".encode()
    assert [token.token for token in tokens[:4]] == ["g", "r", "\\xc3", "\\xbc"]
    assert all(token.logprob == -0.5 for token in tokens)
    speller = TokenSpeller(TOKENIZER)
    for token, id_ in zip(tokens, ids, strict=True):
        others = [(bytes(other.bytes), other.logprob) for other in token.top_logprobs]
        assert others == [(speller.spell((id_ + i) % BYTES).bytes, -0.5 - i) for i in range(3)]
    assert answer.choices[0].logprobs.refusal is None


def test_chat_without_alternatives_has_only_the_tokens_logprobs(node: Node) -> None:
    tokens = node.ask(logprobs=True).choices[0].logprobs.content
    assert node.engine.requests[0].logprobs == 0
    assert [(t.token, t.logprob, t.top_logprobs) for t in tokens] == [(c, -0.5, []) for c in "hello"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_absent_by_default(node: Node, stream: bool) -> None:
    answers = list(node.ask(stream=True)) if stream else [node.ask()]
    assert all(choice.logprobs is None for answer in answers for choice in answer.choices)
    assert node.engine.requests[0].logprobs is None


def test_a_special_token_has_no_bytes(node: Node) -> None:
    node.engine.eos = TOKENIZER.eos_token_id
    answer = node.ask("hi", logprobs=True)
    assert answer.choices[0].message.content == "hi"
    assert [(t.token, t.bytes) for t in answer.choices[0].logprobs.content] == [
        ("h", [104]),
        ("i", [105]),
        ("<eos>", None),
    ]
    assert answer.usage.completion_tokens == 3


def test_streamed_tokens_arrive_with_their_text(node: Node) -> None:
    node.engine.eos = TOKENIZER.eos_token_id
    chunks = list(node.ask("grüße 🙂", logprobs=True, top_logprobs=2, stream=True))
    streamed = b""
    for choice in (chunk.choices[0] for chunk in chunks):
        tokens = choice.logprobs.content if choice.logprobs else []
        assert bytes(b for t in tokens for b in t.bytes or []) == (choice.delta.content or "").encode()
        assert all(len(t.top_logprobs) == 2 for t in tokens)
        streamed += bytes(b for t in tokens for b in t.bytes or [])
    assert streamed == "grüße 🙂".encode()
    assert chunks[-2].choices[0].logprobs.content[-1].token == "<eos>"
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_the_stop_string_are_not_reported(node: Node, stream: bool) -> None:
    answer = node.ask("one two three", logprobs=True, stop="two", stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(t.token for c in choices if c.logprobs for t in c.logprobs.content) == "one "


def test_text_completions_have_parallel_lists(node: Node) -> None:
    (choice,) = node.complete("añb", logprobs=2).choices
    assert choice.logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xb1", "b"]
    assert choice.logprobs.token_logprobs == [-0.5] * 4
    assert choice.logprobs.text_offset == [0, 1, 1, 2]
    assert [list(top.values()) for top in choice.logprobs.top_logprobs] == [[-0.5, -1.5]] * 4
    assert choice.logprobs.top_logprobs[0]["a"] == -0.5


def test_streamed_text_completions_have_the_same_lists_in_parts(node: Node) -> None:
    (whole,) = node.complete("añb 🙂", logprobs=1).choices
    parts = [c.choices[0].logprobs for c in node.complete("añb 🙂", logprobs=1, stream=True) if c.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for part in parts for value in getattr(part, name)] == getattr(whole.logprobs, name)


def test_the_alternatives_of_a_text_completion_include_the_token_itself(node: Node) -> None:
    (choice,) = node.complete("ab", logprobs=0).choices
    assert choice.logprobs.top_logprobs == [{"a": -0.5}, {"b": -0.5}]


def test_a_token_of_probability_zero_has_openais_minimum_logprob(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(tokens: Any, alternatives: int) -> tuple[TokenLogprobs, ...]:
        return tuple(TokenLogprobs(float("-inf"), ((token, float("-inf")),)) for token in tokens)

    monkeypatch.setattr("echo_engine.scores", impossible)
    (token,) = node.ask("a", logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert (token.logprob, token.top_logprobs[0].logprob) == (-9999.0, -9999.0)
    (choice,) = node.complete("a", logprobs=1).choices
    assert choice.logprobs.token_logprobs == [-9999.0]
