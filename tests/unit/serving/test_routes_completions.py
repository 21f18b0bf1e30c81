"""Text completions with OpenAI's client, over a real socket and an echo engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from api_node import Node, eventually, running_node
from echo_engine import byte_tokenizer, encode

HELLO = list(encode(byte_tokenizer(), "hello"))
WORLD = list(encode(byte_tokenizer(), "world"))


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node() as node:
        yield node


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("hello", ["hello"]),
        (["hello", "world"], ["hello", "world"]),
        (HELLO, ["hello"]),
        ([HELLO, WORLD], ["hello", "world"]),
        ([HELLO, "world"], ["hello", "world"]),
    ],
)
def test_a_prompt_is_one_or_several_texts_or_lists_of_token_ids(node: Node, prompt: Any, texts: list[str]) -> None:
    answer = node.complete(prompt)
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [
        (i, text, "stop") for i, text in enumerate(texts)
    ]
    tokens = sum(len(text) for text in texts)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (tokens, tokens)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.aurora["speculators"] == ["day-0-head-0"]


def test_choices_are_grouped_by_prompt_and_each_prompt_starts_at_the_seed(node: Node) -> None:
    answer = node.complete(["hello", "world"], n=2, seed=5)
    assert [c.text for c in answer.choices] == ["hello", "hello", "world", "world"]
    assert [r.seed for r in node.engine.requests] == [5, 6, 5, 6]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 20)


def test_max_tokens_is_sixteen_by_default(node: Node) -> None:
    long = "x" * 40
    assert node.complete(long).choices[0].finish_reason == "length"
    assert len(node.complete(long).choices[0].text) == 16
    assert len(node.complete(long, max_tokens=39).choices[0].text) == 39


def test_streamed_completions_carry_their_index_and_end_with_usage(node: Node) -> None:
    stream = node.complete(["hello", "grüße 🙂"], stream=True, stream_options={"include_usage": True})
    texts, ends = ["", ""], {}
    *chunks, last = list(stream)
    for (choice,) in (chunk.choices for chunk in chunks):
        texts[choice.index] += choice.text
        ends[choice.index] = choice.finish_reason
    assert texts == ["hello", "grüße 🙂"]
    assert ends == {0: "stop", 1: "stop"}
    assert last.choices == []
    assert last.usage.completion_tokens == last.usage.prompt_tokens == len("hellogrüße 🙂".encode())
    assert {c.object for c in chunks} == {"text_completion"}


def test_a_stop_string_is_cut_out(node: Node) -> None:
    (choice,) = node.complete("one two three", stop=["tw"]).choices
    assert (choice.text, choice.finish_reason) == ("one ", "stop")


def test_a_disconnect_cancels_every_prompt(node: Node) -> None:
    node.engine.gate.clear()
    with pytest.raises(openai.APITimeoutError):
        node.complete(["a long answer", "another"], timeout=0.5)
    eventually(lambda: list(node.engine.ended.values()) == ["cancelled"] * 2)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": [1, "hello"]}, "prompt", "invalid_value"),
        ({"prompt": [True]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [1, 257]}, "prompt", "invalid_value"),
        ({"prompt": {"text": "hello"}}, "prompt", "invalid_value"),
        ({"prompt": ["x"] * 33}, "n", "invalid_value"),
        ({"prompt": ["hello", "x" * 200]}, "prompt", "context_length_exceeded"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"tools": []}, "tools", "unknown_parameter"),
        ({"model": "gpt-4"}, "model", "model_not_found"),
    ],
)
def test_an_unsupported_parameter_is_rejected_by_name(node: Node, body: dict[str, Any], param: str, code: str) -> None:
    answer = node.post("/v1/completions", **body)
    error = answer.json()["error"]
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    assert (error["param"], error["code"]) == (param, code)
    assert node.engine.requests == []
    assert node.metric("aurora_serve_requests_total", outcome="rejected") == 1


def test_parameters_with_neutral_values_are_accepted(node: Node) -> None:
    answer = node.post("/v1/completions", echo=False, suffix="", best_of=1, logit_bias={}, user="someone")
    assert answer.json()["choices"][0]["text"] == "hello"
