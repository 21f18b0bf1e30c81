"""Text completions that begin with their prompt, with the log-probabilities of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api_node import Node, running_node
from echo_engine import EOS, byte_tokenizer, encode
from tokenizers import processors

from serving.http.echo import EchoedPrompt

TOKENIZER = byte_tokenizer()


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node() as node:
        yield node


def test_the_text_begins_with_the_prompt(node: Node) -> None:
    answer = node.complete("héllo", echo=True)
    assert [(c.text, c.logprobs) for c in answer.choices] == [("héllohéllo", None)]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 6)
    assert node.engine.requests[0].prompt_logprobs is None


def test_the_lists_begin_with_the_prompts_tokens_and_the_first_has_no_logprob(node: Node) -> None:
    (choice,) = node.complete("añb", echo=True, logprobs=2).choices
    logprobs = choice.logprobs
    assert choice.text == "añbañb"
    assert logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xb1", "b"] * 2
    assert logprobs.token_logprobs == [None, *[-0.5] * 7]
    assert logprobs.text_offset == [0, 1, 1, 2, 3, 4, 4, 5]
    assert logprobs.top_logprobs[0] is None
    assert [list(top.values()) for top in logprobs.top_logprobs[1:]] == [[-0.5, -1.5]] * 7


@pytest.mark.parametrize("prompt", ["a", "hello"])
def test_without_output_tokens_a_prompt_is_only_scored(node: Node, prompt: str) -> None:
    answer = node.complete(prompt, echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (prompt, "length")
    assert choice.logprobs.token_logprobs == [None, *[-0.5] * (len(prompt) - 1)]
    assert answer.usage.completion_tokens == 0
    (request,) = node.engine.requests
    assert (request.max_tokens, request.trace) == (0, False)


def test_every_prompt_and_every_choice_has_its_own_beginning(node: Node) -> None:
    prompts = ["hello", list(encode(TOKENIZER, "grüße"))]
    answer = node.complete(prompts, echo=True, n=2, logprobs=1, max_tokens=1)
    assert [c.text for c in answer.choices] == ["helloh", "helloh", "grüßeg", "grüßeg"]
    assert [len(c.logprobs.tokens) for c in answer.choices] == [6, 6, 8, 8]


def test_a_stop_string_cuts_the_answer_and_not_the_prompt(node: Node) -> None:
    (choice,) = node.complete("one two", echo=True, logprobs=0, stop="two").choices
    assert choice.text == "one twoone "
    assert "".join(choice.logprobs.tokens) == "one twoone "


@pytest.mark.parametrize("logprobs", [None, 1])
def test_streamed_the_prompt_comes_with_the_first_text(node: Node, logprobs: int | None) -> None:
    options: Any = {"echo": True, "logprobs": logprobs}
    (whole,) = node.complete("añb 🙂", **options).choices
    parts = [c.choices[0] for c in node.complete("añb 🙂", stream=True, **options)]
    assert "".join(part.text for part in parts) == whole.text
    assert parts[0].text.startswith("añb 🙂")
    if logprobs is not None:
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            streamed = [value for part in parts if part.logprobs for value in getattr(part.logprobs, name)]
            assert streamed == getattr(whole.logprobs, name)


def test_a_chat_has_no_echo(node: Node) -> None:
    answer = node.post(echo=True)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "echo")


def test_tokens_that_the_tokenizer_adds_have_no_place_in_the_clients_text() -> None:
    tokenizer = byte_tokenizer()
    first = (EOS, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{EOS} $A", special_tokens=[first])
    ids = tokenizer.encode("ab")
    assert ids[0] == tokenizer.eos_token_id
    assert EchoedPrompt.read(tokenizer, "ab", ids) == EchoedPrompt("ab", tuple(ids), (0, 0, 1))
    as_ids = EchoedPrompt.read(tokenizer, ids, ids)
    assert as_ids == EchoedPrompt(f"{EOS}ab", tuple(ids), (0, len(EOS), len(EOS) + 1))
