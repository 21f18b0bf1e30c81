"""Chat completions with OpenAI's client, over a real socket and an echo engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from api_node import MODEL, Node, eventually, running_node

from schemas.status import ServeStatus


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node() as node:
        yield node


def test_an_answer_has_text_usage_and_decoding_statistics(node: Node) -> None:
    answer = node.ask("grüße 🙂")
    tokens = len("grüße 🙂".encode())
    verify_steps = -(-tokens // 2)
    assert answer.choices[0].message.content == "grüße 🙂"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id == node.engine.requests[0].id
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (tokens, tokens)
    details = answer.usage.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (verify_steps, 2 * verify_steps)
    assert answer.aurora == {
        "verify_steps": verify_steps,
        "draft_tokens": 3 * verify_steps,
        "accepted_tokens": verify_steps,
        "suffix_accepted_tokens": 0,
        "speculators": ["day-0-head-0"],
    }


def test_a_stream_has_whole_characters_and_the_usage_last(node: Node) -> None:
    chunks = list(node.ask("grüße 🙂 ✓", stream=True, stream_options={"include_usage": True}))
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(texts) == "grüße 🙂 ✓"
    assert len(texts) > 3
    assert not any("\ufffd" in text for text in texts)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len("grüße 🙂 ✓".encode())
    assert chunks[-1].aurora["verify_steps"] > 0
    assert {c.id for c in chunks} == {node.engine.requests[0].id}


def test_usage_is_streamed_only_on_request(node: Node) -> None:
    assert all(c.usage is None and c.choices for c in node.ask(stream=True))


def test_every_chunk_can_carry_the_usage(node: Node) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(node.ask("hello", stream=True, stream_options=options))
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[1], counts[-1]) == (0, 2, 5)
    assert {c.usage.prompt_tokens for c in chunks} == {5}


def test_the_parameters_reach_the_engine(node: Node) -> None:
    headers = {b"x-aurora-label": "größe".encode(), b"x-aurora-trace": b"off", b"x-aurora-speculate": b"off"}
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}],
        "max_completion_tokens": 3,
        "temperature": 0,
        "top_p": 0.5,
        "seed": 7,
        "user": "someone",
        "n": 1,
        "frequency_penalty": 0,
        "top_k": 5,
        "stop_token_ids": [250, 251],
        "ignore_eos": True,
    }
    answer = httpx.post(f"{node.url}/v1/chat/completions", json=body, headers=headers)
    (request,) = node.engine.requests
    assert (request.max_tokens, request.temperature, request.top_p, request.seed) == (3, 0.0, 0.5, 7)
    assert (request.top_k, request.stop_ids, request.ignore_eos) == (5, frozenset({250, 251}), True)
    assert (request.label, request.trace, request.speculate) == ("größe", False, False)
    assert len(request.prompt) == len("hel\nlo")
    assert answer.headers["x-aurora-speculator"] == ""
    assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_the_defaults_are_openais_and_the_maximum_length(node: Node) -> None:
    answer = node.post()
    (request,) = node.engine.requests
    assert (request.max_tokens, request.temperature, request.top_p, request.seed) == (195, 1.0, 1.0, None)
    assert (request.top_k, request.ignore_eos, request.logprobs) == (0, False, None)
    assert request.stop_ids == {256}, "the tokenizer's end token"
    assert (request.label, request.trace, request.speculate) == (None, True, True)
    assert answer.headers["x-aurora-speculator"] == "day-0-head-0"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_cut_out_and_ends_the_request(node: Node, stream: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = node.ask("one two three four five six", stop=["thr", "never"], **options)
    if stream:
        chunks = list(answer)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        finish, usage = chunks[-2].choices[0].finish_reason, chunks[-1].usage
    else:
        text, finish, usage = answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage
    assert (text, finish) == ("one two ", "stop")
    assert usage.completion_tokens == len("one two thr")


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 33}, "n", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "invalid_value"),
        ({"stop_token_ids": [257]}, "stop_token_ids", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "missing_required_parameter"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "invalid_value"),
        ({"logit_bias": {"257": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"allowed_token_ids": [257]}, "allowed_token_ids", "invalid_value"),
        ({"stop": ["a"] * 65}, "stop", "invalid_value"),
        ({"stop": ""}, "stop.0", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "user", "content": "refuse me"}]}, "messages", "invalid_value"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"model": "gpt-4"}, "model", "model_not_found"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "messages", "context_length_exceeded"),
    ],
)
def test_an_unsupported_parameter_is_rejected_by_name_in_openais_shape(
    node: Node, body: dict[str, Any], param: str, code: str
) -> None:
    answer = node.post(**body)
    error = answer.json()["error"]
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert error["message"]
    assert node.engine.requests == []
    assert node.metric("aurora_serve_requests_total", outcome="rejected") == 1


def test_invalid_json_and_unknown_paths_get_errors_in_openais_shape(node: Node) -> None:
    answer = httpx.post(f"{node.url}/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    answer = httpx.get(f"{node.url}/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


@pytest.mark.parametrize(
    ("header", "value"), [("x-aurora-trace", "of"), ("x-aurora-speculate", "no"), ("x-aurora-label", "x" * 257)]
)
def test_an_invalid_header_is_rejected(node: Node, header: str, value: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        node.ask(extra_headers={header: value})
    assert raised.value.param == header


def test_a_full_engine_is_a_429_with_retry_after(node: Node) -> None:
    node.engine.full = True
    with pytest.raises(openai.RateLimitError) as raised:
        node.ask()
    assert raised.value.code == "engine_full"
    assert raised.value.response.headers["retry-after"] == "1"
    assert node.metric("aurora_serve_requests_total", outcome="rejected") == 1


def test_a_stopped_engine_is_a_503_and_makes_the_node_unhealthy(node: Node) -> None:
    assert httpx.get(f"{node.url}/health").status_code == httpx.head(f"{node.url}/ready").status_code == 200
    node.engine.dead = True
    with pytest.raises(openai.InternalServerError) as raised:
        node.ask()
    assert raised.value.status_code == 503
    assert httpx.get(f"{node.url}/health").status_code == httpx.get(f"{node.url}/ready").status_code == 503


def test_an_engine_failure_during_an_answer_is_reported_to_the_client(node: Node) -> None:
    node.engine.dies_with = "cache torn"
    with pytest.raises(openai.InternalServerError, match="cache torn"):
        node.ask()
    with pytest.raises(openai.APIError, match="cache torn"):
        list(node.ask(stream=True))
    assert node.metric("aurora_serve_requests_total", outcome="failed") == 2


def test_a_disconnect_during_a_stream_cancels_the_request(node: Node) -> None:
    node.engine.gate.clear()
    stream = node.ask("a long answer", stream=True)
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    stream.close()
    eventually(lambda: list(node.engine.ended.values()) == ["cancelled"])
    eventually(lambda: node.metric("aurora_serve_requests_total", outcome="cancelled") == 1)


def test_a_disconnect_before_the_answer_cancels_the_request(node: Node) -> None:
    node.engine.gate.clear()
    with pytest.raises(openai.APITimeoutError):
        node.ask("a long answer", timeout=0.5)
    eventually(lambda: list(node.engine.ended.values()) == ["cancelled"])
    eventually(lambda: node.metric("aurora_serve_requests_total", outcome="cancelled") == 1)


def test_requests_are_answered_concurrently(node: Node) -> None:
    node.engine.gate.clear()
    first, second = node.ask("first answer", stream=True), node.ask("second answer", stream=True)
    eventually(lambda: len(node.engine.requests) == 2)
    node.engine.gate.set()
    texts = ["".join(c.choices[0].delta.content or "" for c in stream) for stream in (first, second)]
    assert texts == ["first answer", "second answer"]


def test_the_model_is_listed(node: Node) -> None:
    assert [m.id for m in node.client.models.list()] == [MODEL]
    assert node.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        node.client.models.retrieve("gpt-4")


def test_status_and_metrics_count_the_requests(node: Node) -> None:
    node.ask("hello")
    node.ask("hello", max_tokens=2)
    status = ServeStatus.model_validate(httpx.get(f"{node.url}/status").json())
    assert (status.node, status.line, status.requests_finished, status.requests_failed, status.engine_up) == (
        "node-a",
        "echo-line",
        2,
        0,
        True,
    )
    assert node.metric("aurora_serve_requests_total", outcome="stop") == 1
    assert node.metric("aurora_serve_requests_total", outcome="length") == 1
    assert node.metric("aurora_serve_time_to_first_token_seconds_count") == 2
    assert node.metric("aurora_serve_inter_token_latency_seconds_count") == 3
    assert node.metric("aurora_serve_request_queue_time_seconds_count") == 2
    assert node.metric("aurora_serve_draft_tokens_total") == 12
    assert (status.draft_depth, status.expected_tokens_per_second) == (3, [50.0, 60.0, 66.0, 64.0])
    assert node.metric("aurora_serve_draft_depth") == 3
    assert node.metric("aurora_serve_expected_tokens_per_second", draft_depth="2") == 66


def test_events_are_valid_server_sent_events(node: Node) -> None:
    answer = node.post(stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events)


def test_health_and_ready_have_no_body_for_head(node: Node) -> None:
    for path in ("/health", "/ready"):
        answer = httpx.head(node.url + path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_a_preflight_request_gets_no_permission(node: Node) -> None:
    headers = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    answer = httpx.options(f"{node.url}/v1/chat/completions", headers=headers)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]
