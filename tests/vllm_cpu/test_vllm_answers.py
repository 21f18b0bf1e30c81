"""The node answers as vLLM does for the same target, where the answer is deterministic: greedily, in fp32."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from serving_node import MODEL, Node

from ops.bench.serving.vllm_server import VllmServer

FRANCE = "The capital of France is"
HELLO = [{"role": "user", "content": "Say hello to a cat."}]

COMPLETIONS: dict[str, dict[str, Any]] = {
    "text": {"prompt": FRANCE},
    "token ids": {"prompt": [504, 3575, 282], "max_tokens": 9},
    "several prompts": {"prompt": [FRANCE, "def add(a, b):"], "max_tokens": 12},
    "stop string": {"prompt": FRANCE, "stop": "."},
    "stop strings": {"prompt": "One, two, three,", "stop": ["never", "ive, s"], "max_tokens": 20},
    "stop token": {"prompt": FRANCE, "stop_token_ids": [30]},
    "stop token with log-probabilities": {"prompt": FRANCE, "stop_token_ids": [30], "logprobs": 1},
    "stop token with echo": {"prompt": FRANCE, "stop_token_ids": [30], "logprobs": 1, "echo": True},
    "log-probabilities": {"prompt": FRANCE, "max_tokens": 8, "logprobs": 3},
    "log-probabilities without alternatives": {"prompt": FRANCE, "max_tokens": 4, "logprobs": 0},
    "echo": {"prompt": FRANCE, "max_tokens": 5, "echo": True},
    "echo with log-probabilities": {"prompt": FRANCE, "max_tokens": 5, "echo": True, "logprobs": 2},
    "scored prompt": {"prompt": FRANCE, "max_tokens": 0, "echo": True, "logprobs": 1},
    "neutral values": {"prompt": FRANCE, "repetition_penalty": 1.0, "top_p": 1.0, "top_k": -1, "user": "me"},
}
CHATS: dict[str, dict[str, Any]] = {
    "message": {"messages": HELLO, "max_tokens": 12},
    "conversation": {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            *HELLO,
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": [{"type": "text", "text": "And to"}, {"type": "text", "text": "a dog?"}]},
        ],
        "max_completion_tokens": 10,
    },
    "stop string": {"messages": HELLO, "max_tokens": 30, "stop": [","]},
    "log-probabilities": {"messages": HELLO, "max_tokens": 5, "logprobs": True, "top_logprobs": 3},
    "end token": {"messages": [{"role": "user", "content": "Reply with the word yes."}], "max_tokens": 60},
}
REQUESTS = [
    *(pytest.param("completions", body, id=f"completions: {name}") for name, body in COMPLETIONS.items()),
    *(pytest.param("chat/completions", body, id=f"chat: {name}") for name, body in CHATS.items()),
]

CHAT, TEXT = {"model": MODEL, "messages": HELLO}, {"model": MODEL, "prompt": "Hi"}
REJECTED = [
    ("chat/completions", CHAT | {"model": "another"}),
    ("chat/completions", CHAT | {"messages": []}),
    ("chat/completions", CHAT | {"messages": "Hi"}),
    ("chat/completions", CHAT | {"temperature": -1}),
    ("chat/completions", CHAT | {"temperature": "warm"}),
    ("chat/completions", CHAT | {"top_p": 0}),
    ("chat/completions", CHAT | {"top_p": 1.5}),
    ("chat/completions", CHAT | {"n": 0}),
    ("chat/completions", CHAT | {"presence_penalty": 3}),
    ("chat/completions", CHAT | {"min_p": 2}),
    ("chat/completions", CHAT | {"top_logprobs": 2}),
    ("chat/completions", CHAT | {"messages": [{"role": "user", "content": "word " * 2000}]}),
    ("completions", TEXT | {"model": "another"}),
    ("completions", TEXT | {"prompt": []}),
    ("completions", TEXT | {"prompt": [999999]}),
    ("completions", TEXT | {"prompt": "word " * 2000}),
    ("completions", TEXT | {"max_tokens": -3}),
    ("completions", TEXT | {"logprobs": -1}),
    ("completions", {"prompt": "Hi", "model": MODEL, "stop": 7}),
]

_ABOUT = 3e-3
"""Rounding of sums in different orders, in fp32 log-probabilities."""


def ask(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/{path}", json={"model": MODEL, "temperature": 0} | body, timeout=120)


def assert_same_score(ours: float | None, theirs: float | None) -> None:
    assert ours == (None if theirs is None else pytest.approx(theirs, abs=_ABOUT))


def assert_same_completion_logprobs(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert (ours["tokens"], ours["text_offset"]) == (theirs["tokens"], theirs["text_offset"])
    for one, other in zip(ours["token_logprobs"], theirs["token_logprobs"], strict=True):
        assert_same_score(one, other)
    for mine, yours in zip(ours["top_logprobs"], theirs["top_logprobs"], strict=True):
        assert (mine is None) == (yours is None)
        if mine is not None:
            assert mine == pytest.approx(yours, abs=_ABOUT)


def assert_same_chat_logprobs(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for mine, yours in zip(ours["content"], theirs["content"], strict=True):
        for one, other in zip([mine, *mine["top_logprobs"]], [yours, *yours["top_logprobs"]], strict=True):
            # vLLM gives a special token the bytes of its name, which is no part of the answer.
            assert one["token"] == other["token"]
            assert one["bytes"] in (other["bytes"], None)
            assert_same_score(one["logprob"], other["logprob"])


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_the_answer_is_vllms(node: Node, vllm: VllmServer, path: str, body: dict[str, Any]) -> None:
    ours, theirs = (ask(server.url, path, body).raise_for_status().json() for server in (node, vllm))
    assert ours["object"] == theirs["object"]
    assert len(ours["choices"]) == len(theirs["choices"])
    for mine, yours in zip(ours["choices"], theirs["choices"], strict=True):
        assert (mine["index"], mine["finish_reason"]) == (yours["index"], yours["finish_reason"])
        assert mine.get("text") == yours.get("text")
        if "chat" in path:
            assert {key: mine["message"][key] for key in ("role", "content", "refusal")} == {
                key: yours["message"][key] for key in ("role", "content", "refusal")
            }
        assert (mine["logprobs"] is None) == (yours["logprobs"] is None)
        if yours["logprobs"] is not None:
            same = assert_same_chat_logprobs if "chat" in path else assert_same_completion_logprobs
            same(mine["logprobs"], yours["logprobs"])
    counted = ["prompt_tokens", *(["completion_tokens", "total_tokens"] if body.get("max_tokens") != 0 else [])]
    assert [ours["usage"][name] for name in counted] == [theirs["usage"][name] for name in counted]


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_the_streamed_answer_is_vllms(node: Node, vllm: VllmServer, path: str, body: dict[str, Any]) -> None:
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    ours, theirs = (read_stream(ask(server.url, path, streamed)) for server in (node, vllm))
    assert ours == theirs


def read_stream(response: httpx.Response) -> tuple[dict[int, str], dict[int, str], dict[str, int]]:
    """Texts and finish reasons by choice, and the usage."""
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    usage: dict[str, int] = {}
    *events, last = [line.removeprefix("data: ") for line in response.raise_for_status().text.split("\n") if line]
    assert last == "[DONE]"
    for chunk in map(json.loads, events):
        for choice in chunk["choices"]:
            text = choice.get("text") if "text" in choice else choice["delta"].get("content")
            texts[choice["index"]] = texts.get(choice["index"], "") + (text or "")
            if choice["finish_reason"] is not None:
                ends[choice["index"]] = choice["finish_reason"]
        if chunk.get("usage"):
            usage = {"prompt_tokens": chunk["usage"]["prompt_tokens"]}
    return texts, ends, usage


@pytest.mark.parametrize(("path", "body"), REJECTED)
def test_a_rejected_request_has_vllms_status(node: Node, vllm: VllmServer, path: str, body: dict[str, Any]) -> None:
    ours, theirs = (httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60) for server in (node, vllm))
    assert ours.status_code == theirs.status_code
    assert {"message", "type", "param", "code"} <= set(ours.json()["error"])
    # Where vLLM names a parameter, the node does; vLLM's also has places of its validators.
    named = (theirs.json()["error"].get("param") or "").partition(".")[0]
    if named in body:
        assert ours.json()["error"]["param"].startswith(named)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/chat/completions", 405), ("GET", "/v1/models/another", 404), ("POST", "/v1/none", 404)],
)
def test_a_wrong_path_or_method_has_vllms_status(
    node: Node, vllm: VllmServer, method: str, path: str, status: int
) -> None:
    found = [httpx.request(method, server.url + path, timeout=60).status_code for server in (node, vllm)]
    assert found == [status, status]
