"""Requests with several choices: each choice is a sequence in the engine; all are queued, or none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from api_node import Node, eventually, running_node

from schemas.settings import Serve


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node(Serve(max_choices=4)) as node:
        yield node


def texts(chunks: list[Any]) -> dict[int, str]:
    """Return the streamed texts by choice."""
    found: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        found[choice.index] = found.get(choice.index, "") + (choice.delta.content or "")
    return found


def test_every_choice_is_a_sequence_of_its_own_with_the_next_seed(node: Node) -> None:
    answer = node.ask("hello", n=3, seed=7, max_tokens=4)
    assert [r.seed for r in node.engine.requests] == [7, 8, 9]
    assert [r.id for r in node.engine.requests] == [f"{answer.id}-{i}" for i in range(3)]
    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [
        (i, "hell", "length") for i in range(3)
    ]


def test_seeds_wrap_around(node: Node) -> None:
    node.ask(n=2, seed=2**63 - 1)
    assert [r.seed for r in node.engine.requests] == [2**63 - 1, -(2**63)]


def test_choices_have_no_seed_without_one_in_the_request(node: Node) -> None:
    node.ask(n=2)
    assert [r.seed for r in node.engine.requests] == [None, None]


def test_usage_counts_prompt_tokens_that_no_choice_had_to_read(node: Node) -> None:
    node.engine.cached_tokens = [2, 4]
    answer = node.ask("hello", n=2, extra_body={"cache_salt": "mine"})
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert [request.cache_salt for request in node.engine.requests] == ["mine", "mine"]


def test_usage_counts_the_prompt_once_and_every_answer(node: Node) -> None:
    answer = node.ask("hello", n=3)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 15)
    assert answer.aurora == {
        "verify_steps": 9,
        "draft_tokens": 27,
        "accepted_tokens": 9,
        "suffix_accepted_tokens": 0,
        "speculators": ["day-0-head-0"],
    }
    assert node.metric("aurora_serve_requests_total", outcome="stop") == 3


def test_streamed_choices_are_interleaved_and_carry_their_index(node: Node) -> None:
    node.engine.gate.clear()
    stream = iter(node.ask("hello", n=2, stream=True, stream_options={"include_usage": True}))
    chunks = [next(stream) for _ in range(4)]
    assert [c.choices[0].delta.role for c in chunks[:2]] == ["assistant", "assistant"]
    assert texts(chunks) == {0: "he", 1: "he"}
    node.engine.gate.set()
    chunks += stream
    assert texts(chunks) == {0: "hello", 1: "hello"}
    ends = [(c.choices[0].index, c.choices[0].finish_reason) for c in chunks if c.choices]
    assert sorted(end for end in ends if end[1]) == [(0, "stop"), (1, "stop")]
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (5, 10)


def test_too_many_choices_are_rejected_with_the_name_of_the_setting(node: Node) -> None:
    with pytest.raises(openai.BadRequestError, match=r"at most 4 .*serve\.max_choices"):
        node.ask(n=5)
    assert node.engine.requests == []


def test_an_engine_without_room_for_all_choices_cancels_the_others(node: Node) -> None:
    node.engine.room = 2
    node.engine.gate.clear()
    with pytest.raises(openai.RateLimitError):
        node.ask("a long answer", n=3)
    eventually(lambda: list(node.engine.ended.values()) == ["cancelled"] * 2)
    assert node.metric("aurora_serve_requests_total", outcome="rejected") == 1
    assert node.metric("aurora_serve_requests_total", outcome="cancelled") == 2


def test_a_disconnect_during_a_stream_cancels_all_choices(node: Node) -> None:
    node.engine.gate.clear()
    stream = node.ask("a long answer", n=3, stream=True)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    stream.close()
    eventually(lambda: list(node.engine.ended.values()) == ["cancelled"] * 3)
    eventually(lambda: node.metric("aurora_serve_requests_total", outcome="cancelled") == 3)


def test_a_disconnect_before_the_answer_cancels_all_choices(node: Node) -> None:
    node.engine.gate.clear()
    with pytest.raises(openai.APITimeoutError):
        node.ask("a long answer", n=2, timeout=0.5)
    eventually(lambda: list(node.engine.ended.values()) == ["cancelled"] * 2)


def test_a_failed_choice_fails_the_request_and_cancels_the_others(node: Node) -> None:
    node.engine.dies_with = "cache torn"
    with pytest.raises(openai.InternalServerError, match="cache torn"):
        node.ask(n=2)
    failed = node.metric("aurora_serve_requests_total", outcome="failed")
    assert failed + node.metric("aurora_serve_requests_total", outcome="cancelled") == 2
    assert failed >= 1


def test_a_stop_string_ends_each_choice_separately(node: Node) -> None:
    answer = node.ask("one two three", n=2, stop="tw")
    assert [c.message.content for c in answer.choices] == ["one ", "one "]
    assert answer.usage.completion_tokens == 2 * len("one tw")


def test_a_stop_token_ends_the_answer_is_counted_and_has_no_text(node: Node) -> None:
    (space,) = node.complete(" ", max_tokens=1).choices
    assert space.text == " "
    stop = {"stop_token_ids": [node.engine.requests[0].prompt[0]]}
    answer = node.ask("one two", logprobs=True, extra_body=stop)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("one", "stop")
    assert [token.token for token in choice.logprobs.content] == ["o", "n", "e", " "]
    assert answer.usage.completion_tokens == 4
    streamed = node.ask("one two", stream=True, extra_body=stop)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == "one"


def test_a_stop_token_behind_a_stop_string_is_not_counted(node: Node) -> None:
    end = {"stop_token_ids": [node.engine.vocabulary - 1]}
    node.engine.eos = end["stop_token_ids"][0]
    answer = node.ask("one", stop="one", logprobs=True, extra_body=end)
    assert (answer.choices[0].message.content, answer.usage.completion_tokens) == ("", 3)
    assert answer.choices[0].logprobs.content == []
