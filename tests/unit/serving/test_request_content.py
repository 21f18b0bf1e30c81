"""Content of requests: null and neutral values, message objects of a conversation, and bodies that are no request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_node import MODEL, Node, running_node
from echo_engine import EchoEngine, byte_tokenizer

from serving.http.messages import Message
from serving.http.requests import ChatRequest, CompletionBody, CompletionRequest

USER = {"role": "user", "content": "Say hello."}
CALL = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node() as node:
        yield node


def answer_to(node: Node, *messages: Any, **body: Any) -> str:
    answer = node.post(messages=list(messages), **body)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def rejected(answer: httpx.Response) -> tuple[str, str]:
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["message"]
    return error["param"], error["code"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_official_clients_message_object_is_a_message_of_the_next_turn(node: Node, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "one"}]
    for turn in ("two", "three"):
        if stream:
            with node.client.chat.completions.stream(model=MODEL, messages=messages) as events:
                answer = events.get_final_completion()
        else:
            answer = node.client.chat.completions.create(model=MODEL, messages=messages)
        said = answer.choices[0].message
        messages += [said, said.model_dump(), {"role": "user", "content": turn}]
    assert said.content == "oneoneonetwo"


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_null_is_an_absent_value_of_every_parameter(kind: type[CompletionBody]) -> None:
    required: dict[str, Any] = {"model": MODEL, "messages": [USER]} if kind is ChatRequest else {"model": MODEL}
    required |= {"prompt": "x"} if kind is CompletionRequest else {}
    names = {*kind.model_fields, *kind.unsupported, *kind.ignored, "a_later_parameter"} - required.keys()
    assert kind.model_validate(required | dict.fromkeys(names)) == kind.model_validate(required)


def test_null_and_empty_lists_are_absent_values_inside_a_message(node: Node) -> None:
    nulls = dict.fromkeys(("refusal", "audio", "annotations", "function_call", "tool_calls", "name", "reasoning"))
    said = {"role": "assistant", "content": "Hello!"}
    part = {"type": "text", "text": "Hello!", "cache_control": None}
    variants: list[Any] = [nulls, {"tool_calls": [], "annotations": []}, {"content": [part]}, {"content": ["Hello!"]}]
    for variant in variants:
        assert answer_to(node, USER, said | variant) == "Say hello.Hello!"


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_values_that_change_nothing_are_served(kind: type[CompletionBody]) -> None:
    required: dict[str, Any] = {"model": MODEL} | ({"messages": [USER]} if kind is ChatRequest else {"prompt": "x"})
    for name, neutral in kind.unsupported.items():
        for value in neutral:
            assert kind.model_validate(required | {name: value}) == kind.model_validate(required)
    assert kind.model_validate(required | {"response_format": {"type": "text", "json_schema": None}})


@pytest.mark.parametrize("name", sorted(ChatRequest.unsupported))
def test_other_values_of_an_unsupported_parameter_are_rejected_by_its_name(node: Node, name: str) -> None:
    assert rejected(node.post(**{name: {"some": "value"}})) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    "body",
    [
        {"max_completion_tokens": 8, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0},
        {"max_tokens": 8, "temperature": 0, "stop": ["\n\n", "Q:", "</s>", "<eos>"], "seed": 1234},
        {"user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "logprobs": False, "n": 1},
        {"logprobs": None, "top_logprobs": None, "chat_template_kwargs": {}, "parallel_tool_calls": True, "tools": []},
    ],
    ids=["vllm bench serve", "lm-evaluation-harness", "openai", "neutral"],
)
def test_chat_requests_of_other_tools_are_served(node: Node, body: dict[str, Any]) -> None:
    assert node.post(**body).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {
            "prompt": "The capital of France is",
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": 8,
            "logprobs": None,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        },
        {"prompt": [[3, 4], [5]], "max_tokens": 8, "temperature": 0, "stop": list("abcdefgh"), "seed": 1234},
        {"prompt": ["a", "b"], "max_tokens": 8, "temperature": 0, "stop": [], "seed": 1234, "top_p": 1},
        {"logprobs": False, "echo": False, "best_of": 1, "suffix": "", "min_p": 0.0, "top_k": -1},
    ],
    ids=["vllm bench serve", "lm-evaluation-harness by ids", "lm-evaluation-harness by texts", "neutral"],
)
def test_text_completions_of_other_tools_are_served(node: Node, body: dict[str, Any]) -> None:
    answer = node.post("/v1/completions", **body)
    assert answer.status_code == 200
    if not body.get("stream"):
        assert all(choice["logprobs"] is None for choice in answer.json()["choices"])


def test_vllms_benchmark_finds_the_model(node: Node) -> None:
    (model,) = httpx.get(f"{node.url}/v1/models").json()["data"]
    assert (model["id"], model["root"]) == (MODEL, MODEL)


@pytest.mark.parametrize("content", [None, "", []])
def test_calls_of_the_history_and_their_results_reach_the_chat_template(node: Node, content: Any) -> None:
    called = {"role": "assistant", "content": content, "tool_calls": [CALL | {"index": 0}]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "12:00"}]}
    assert answer_to(node, USER, called, result) == "Say hello.clockUTC12:00"


def test_a_chat_template_gets_roles_texts_and_calls() -> None:
    def template_message(**fields: Any) -> dict[str, Any]:
        return Message.model_validate(fields).for_template()

    assert template_message(role="developer", content=["a", {"type": "text", "text": "b"}]) == {
        "role": "system",
        "content": "a\nb",
    }
    assert template_message(role="tool", content="12:00", tool_call_id="call_1", name="clock") == {
        "role": "tool",
        "content": "12:00",
        "name": "clock",
        "tool_call_id": "call_1",
    }
    assert template_message(role="assistant", content="x", reasoning="y") == {
        "role": "assistant",
        "content": "x",
        "reasoning": "y",
        "reasoning_content": "y",
    }
    calls = [CALL, CALL | {"function": {"name": "now", "arguments": ""}}, {"function": {"name": "now"}}]
    assert [call["function"] for call in template_message(role="assistant", tool_calls=calls)["tool_calls"]] == [
        {"name": "clock", "arguments": {"zone": "UTC"}},
        {"name": "now", "arguments": {}},
        {"name": "now", "arguments": {}},
    ]


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "user"}, "content", "missing_required_parameter"),
        ({"role": "assistant", "content": None}, "content", "missing_required_parameter"),
        ({"role": "tool", "content": None, "tool_call_id": "c"}, "content", "missing_required_parameter"),
        ({"content": "x"}, "role", "missing_required_parameter"),
        ({"role": "function", "content": "x"}, "role", "invalid_value"),
        ({"role": "user", "content": 7}, "content", "invalid_value"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content.0.type", "invalid_value"),
        ({"role": "user", "content": [{"type": "text"}]}, "content.0.text", "missing_required_parameter"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "tool_calls", "invalid_value"),
        ({"role": "user", "content": "x", "reasoning": "y"}, "reasoning", "invalid_value"),
        ({"role": "user", "content": "x", "tool_call_id": "c"}, "tool_call_id", "invalid_value"),
        ({"role": "assistant", "content": "x", "refusal": "No."}, "refusal", "unsupported_parameter"),
        ({"role": "assistant", "content": "x", "mood": "glad"}, "mood", "unknown_parameter"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "tool_calls.0.function.arguments",
            "invalid_value",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]},
            "tool_calls.0.function.arguments",
            "invalid_value",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "tool_calls.0.function.arguments",
            "invalid_value",
        ),
    ],
)
def test_an_invalid_message_is_rejected_by_the_path_to_its_fault(
    node: Node, message: dict[str, Any], param: str, code: str
) -> None:
    assert rejected(node.post(messages=[USER, message])) == (f"messages.1.{param}", code)
    assert node.engine.requests == []


def test_variables_reach_the_chat_template_but_replace_nothing_of_the_server(node: Node) -> None:
    assert answer_to(node, USER, chat_template_kwargs={"closing": "!", "unused": None}) == "Say hello.!"
    for name in ("messages", "conversation", "tokenize", "chat_template", "add_generation_prompt", "return_dict"):
        param = f"chat_template_kwargs.{name}"
        assert rejected(node.post(chat_template_kwargs={name: "x"})) == (param, "invalid_value")
    calls = [{"function": {"name": "f", "arguments": {"zone": "UTC"}}}]
    assert answer_to(node, USER, {"role": "assistant", "tool_calls": calls}) == "Say hello.fUTC"


def test_a_value_that_the_template_cannot_use_is_an_error_about_the_messages() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content + number }}"
    with running_node(tokenizer=tokenizer) as node:
        assert rejected(node.post(chat_template_kwargs={"number": 7})) == ("messages", "invalid_value")


def test_a_target_without_a_chat_template_serves_text_completions_only() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with running_node(tokenizer=tokenizer) as node:
        assert rejected(node.post()) == ("messages", "invalid_value")
        assert node.complete("hello").choices[0].text == "hello"


def test_a_text_with_a_token_that_the_target_lacks_is_rejected() -> None:
    engine = EchoEngine()
    engine.vocabulary = 100
    with running_node(engine=engine) as node:
        assert rejected(node.post(messages=[{"role": "user", "content": "🙂"}])) == ("messages", "invalid_value")
        assert rejected(node.post("/v1/completions", prompt=["a", "🙂"])) == ("prompt", "invalid_value")
        assert rejected(node.post("/v1/completions", prompt=[[99, 100]])) == ("prompt", "invalid_value")
        assert rejected(node.post("/v1/completions", prompt="", stop_token_ids=[])) == ("prompt", "invalid_value")
    assert engine.requests == []


HALF = "cut \ud83d off"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user", "content": HALF}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}, "messages.0.content.0.text"),
        ({"stop": ["a", HALF]}, "stop.1"),
        ({"model": HALF}, "model"),
        ({"user": HALF}, "user"),
        ({"chat_template_kwargs": {"a": [{"b": HALF}]}}, "chat_template_kwargs.a.0.b"),
        ({"metadata": {HALF: "x"}}, "metadata"),
        ({HALF: "x"}, None),
    ],
)
def test_half_a_surrogate_pair_anywhere_is_rejected_by_its_path(
    node: Node, body: dict[str, Any], param: str | None
) -> None:
    content = json.dumps({"model": MODEL, "messages": [USER]} | body)
    answer = httpx.post(
        f"{node.url}/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert rejected(answer) == (param, "invalid_value")


@pytest.mark.parametrize("temperature", [0, 1e-40, 5e-324, 9.9e-7])
def test_a_temperature_below_a_millionth_is_greedy(node: Node, temperature: float) -> None:
    node.ask(temperature=temperature)
    assert node.engine.requests[0].temperature == 0
    node.ask(temperature=1e-6)
    assert node.engine.requests[1].temperature == 1e-6


@pytest.mark.parametrize(
    ("content", "headers", "param"),
    [
        (b'{"model": "echo-1"}', {}, "content-type"),
        (b'{"model": "echo-1"}', {"content-type": "text/plain"}, "content-type"),
        (b"[" * 100_000, {"content-type": "application/json"}, None),
        (b'{"seed": ' + b"9" * 5000 + b"}", {"content-type": "application/json"}, None),
        (b'{"model": "\xff"}', {"content-type": "application/json"}, None),
        (b"[]", {"content-type": "application/json"}, None),
        (b"", {"content-type": "application/json"}, None),
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(
    node: Node, content: bytes, headers: dict[str, str], param: str | None
) -> None:
    answer = httpx.post(f"{node.url}/v1/completions", content=content, headers=headers)
    assert rejected(answer)[0] == param


def test_an_answer_ends_with_the_tokenizers_end_token_whatever_the_engine_knows(node: Node) -> None:
    end = byte_tokenizer().eos_token_id
    answer, longer = (node.complete([65, 66, end, 67], extra_body={"ignore_eos": on}) for on in (False, True))
    assert [(c.text, c.finish_reason) for c in (answer.choices[0], longer.choices[0])] == [
        ("bc", "stop"),
        ("bcd", "stop"),
    ]


def test_every_event_is_one_line_whatever_separates_lines_in_its_text(node: Node) -> None:
    text = "a\u2028b\u2029c\x85d\ne"
    answer = node.post(messages=[{"role": "user", "content": text}], stream=True)
    lines = [line for line in answer.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
