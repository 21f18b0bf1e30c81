"""Tools and structured outputs over a real socket; the echo engine answers with its prompt, which can be a call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from api_node import Node, running_node
from echo_engine import byte_tokenizer

from schemas.settings import Serve

CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {"zone": {}}}},
}
ADD = {"type": "function", "function": {"name": "add", "description": "Add", "strict": True}}
NAMED = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>{"name": "clock", "arguments": {"zone": "é"}}</tool_call>'
TEXT = f"Let me see. {CALL}\n{CALL}"
SHOWN_TOOLS = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{# <tool_call> #}"


def tools_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = SHOWN_TOOLS + tokenizer.chat_template
    return tokenizer


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node(Serve(max_model_len=400), tokenizer=tools_tokenizer()) as node:
        node.engine.max_tokens = 600
        yield node


def test_calls_are_parsed_out_of_an_answer(node: Node) -> None:
    choice = node.ask(TEXT, tools=[CLOCK, ADD]).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "[clock][add]Let me see.")
    calls = choice.message.tool_calls
    assert [(call.type, call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("function", "clock", {"zone": "é"})
    ] * 2
    assert len({call.id for call in calls}) == 2
    assert node.metric("aurora_serve_requests_total", outcome="stop") == 1


def test_calls_are_streamed_with_index_and_id(node: Node) -> None:
    chunks = [chunk.choices[0] for chunk in node.ask(TEXT, tools=[CLOCK], stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "[clock]Let me see."
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [(call.index, call.type, call.function.name) for call in calls] == [
        (0, "function", "clock"),
        (1, "function", "clock"),
    ]
    assert all(call.id and json.loads(call.function.arguments) == {"zone": "é"} for call in calls)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


def test_log_probabilities_keep_every_token_of_a_call(node: Node) -> None:
    choice = node.ask(CALL, tools=[CLOCK], logprobs=True).choices[0]
    assert len(choice.logprobs.content) == len(f"[clock]{CALL}".encode())


@pytest.mark.parametrize(
    ("options", "finish", "calls"),
    [
        ({"tool_choice": "auto"}, "tool_calls", 2),
        ({"tool_choice": "required"}, "tool_calls", 2),
        ({"tool_choice": NAMED}, "stop", 2),
        ({"parallel_tool_calls": False}, "tool_calls", 1),
        ({"stop": "Let"}, "stop", 0),
        ({"max_tokens": 15}, "length", 0),
    ],
)
def test_the_choice_decides_the_finish_reason(node: Node, options: dict[str, Any], finish: str, calls: int) -> None:
    choice = node.ask(TEXT, tools=[CLOCK], **options).choices[0]
    assert (choice.finish_reason, len(choice.message.tool_calls or [])) == (finish, calls)


def test_with_choice_none_the_target_sees_no_tools_and_calls_stay_text(node: Node) -> None:
    choice = node.ask(TEXT, tools=[CLOCK], tool_choice="none").choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", TEXT)
    assert choice.message.tool_calls is None


@pytest.mark.parametrize("absent", [{"tools": []}, {"tools": None}, {"tool_choice": None}, {"tool_choice": "auto"}])
def test_neutral_values_ask_for_nothing(node: Node, absent: dict[str, Any]) -> None:
    answer = node.post(**absent, parallel_tool_calls=None, response_format={"type": "text"}, guided_json=None)
    assert answer.json()["choices"][0]["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert node.engine.requests[0].grammar is None


@pytest.mark.parametrize(
    ("body", "matches"),
    [
        ({"tools": [CLOCK], "tool_choice": "required"}, ['<tool_call>\n{"name": "clock", "arguments": {"zone": 1}}']),
        ({"tools": [CLOCK, ADD], "tool_choice": NAMED}, ['<tool_call>\n{"name": "clock"']),
        ({"tools": [CLOCK], "response_format": {"type": "json_object"}}, ['{"a": 1}', '<tool_call>\n{"name"']),
        ({"response_format": {"type": "json_object"}}, ['{"a": [true, null]}']),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}},
            ["-12"],
        ),
        ({"structured_outputs": {"json": '{"enum": ["a"]}'}}, ['"a"']),
        ({"structured_outputs": {"json_object": True}}, ["{}"]),
        ({"structured_outputs": {"choice": ["yes", 'n"o']}}, ["yes", 'n"o']),
        ({"guided_choice": ["a", "b"]}, ["b"]),
        ({"guided_regex": "a/b|[0-9]\n{2}"}, ["a/b", "7\n\n"]),
        ({"guided_json": {"type": "boolean"}}, ["true"]),
        ({"guided_grammar": 'start: x "."\nx: "a" | "(" x ")"'}, ["((a))."]),
    ],
)
def test_the_grammar_of_a_request_reaches_the_engine(node: Node, body: dict[str, Any], matches: list[str]) -> None:
    assert node.post(**body).status_code == 200
    grammar = node.engine.requests[0].grammar
    assert grammar is not None
    for text in matches:
        assert grammar.create_matcher()._matcher.consume_tokens(list(byte_tokenizer()(text)["input_ids"])), text
    assert not grammar.create_matcher()._matcher.consume_tokens(list(byte_tokenizer()("?")["input_ids"]))


def test_text_completions_take_structured_outputs(node: Node) -> None:
    assert node.post("/v1/completions", guided_choice=["a"]).status_code == 200
    assert node.engine.requests[0].grammar is not None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "always"}, "tool_choice.type"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "strin"}}}], "tool_choice": "required"}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "strin"}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"guided_json": {"type": "boolean"}, "allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"tools": [CLOCK], "tool_choice": NAMED, "allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"guided_json": {"type": "integer", "multipleOf": 999983}}, "guided_json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_grammar": "start: ("}, "guided_grammar"),
        ({"guided_choice": [""]}, "guided_choice.0"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ],
)
def test_a_rejection_names_the_parameter(node: Node, body: dict[str, Any], param: str) -> None:
    answer = node.post(**body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert node.post().status_code == 200


@pytest.mark.parametrize(
    ("template", "setting", "served"),
    [
        ("{{ messages[0].content }}", "auto", False),
        ("{{ messages[0].content }}", "hermes", False),
        ("{{ tools }}{{ messages[0].content }}", "auto", False),
        ("{{ tools }}{{ messages[0].content }}", "llama3_json", True),
        ("{{ tools }}{# {\"name\": .., 'parameters': ..} #}{{ messages[0].content }}", "auto", True),
    ],
)
def test_a_chat_template_without_known_calls_rejects_tools(template: str, setting: Any, served: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with running_node(Serve(tool_call_parser=setting), tokenizer=tokenizer) as node:
        answer = node.post(tools=[ADD])
        assert answer.status_code == (200 if served else 400)
        if not served:
            assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (
                "tools",
                "unsupported_parameter",
            )


def test_a_tool_turn_without_content_is_served(node: Node) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    messages = [
        {"role": "user", "content": "Say hello."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    answer = node.post(messages=messages, tools=[CLOCK])
    assert answer.json()["choices"][0]["message"]["content"] == "[clock]Say hello.clockUTC12:00"
