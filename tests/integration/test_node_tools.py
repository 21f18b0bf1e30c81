"""A conversation with tools: OpenAI's client, the built-in engine and a real model with a chat template for tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_node import MODEL, Node, running_node
from tool_template import TEMPLATE
from transformers import AutoTokenizer

from schemas.settings import load
from serving.engines.builtin.engine import BuiltinEngine

PARAMETERS = {
    "type": "object",
    "$defs": {"unit": {"enum": ["celsius", "kelvin"]}},
    "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 80, "tools": TOOLS, "parallel_tool_calls": False}


@pytest.fixture(scope="module")
def node(smollm2: Path) -> Iterator[Node]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    tokenizer.chat_template = TEMPLATE
    engine = BuiltinEngine(load(environ={}, flags={"target.path": str(smollm2), "serve.max_model_len": 512}))
    engine.start()
    with running_node(engine=engine, tokenizer=tokenizer) as node:
        node.client = node.client.with_options(timeout=120)
        yield node


def test_a_conversation_calls_a_function_and_reads_its_result(node: Node) -> None:
    create = node.client.chat.completions.create
    messages: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = create(model=MODEL, messages=messages, tool_choice="required", **OPTIONS).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather"
    assert (arguments.keys(), arguments["unit"] in {"celsius", "kelvin"}) == ({"city", "unit"}, True)
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}]
    second = create(model=MODEL, messages=messages, **OPTIONS).choices[0]
    assert second.message.content or second.message.tool_calls
    messages += [second.message, {"role": "user", "content": "And in Rome?"}]
    with node.client.chat.completions.stream(
        model=MODEL, messages=messages, tool_choice="required", **OPTIONS
    ) as stream:
        third = stream.get_final_completion().choices[0]
    whole = create(model=MODEL, messages=messages, tool_choice="required", **OPTIONS).choices[0]
    assert third.finish_reason == whole.finish_reason == "tool_calls"
    assert third.message.tool_calls[0].function.arguments == whole.message.tool_calls[0].function.arguments


def test_forced_tokens_save_verify_steps_and_change_nothing(node: Node) -> None:
    def ask(speculate: str) -> Any:
        headers = {"x-aurora-speculate": speculate}
        return node.ask("The weather in Oslo?", tool_choice="required", extra_headers=headers, **OPTIONS)

    drafted, alone = ask("on"), ask("off")
    calls = [answer.choices[0].message.tool_calls[0].function for answer in (drafted, alone)]
    assert calls[0] == calls[1]
    assert 2 * drafted.aurora["verify_steps"] < alone.aurora["verify_steps"]


def test_parsed_answers_of_the_client_match_their_schema(node: Node) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    shape: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    for seed in range(3):
        answer = node.ask("Invent a person.", seed=seed, temperature=1, max_tokens=60, response_format=shape)
        assert answer.choices[0].finish_reason == "stop"
        assert json.loads(answer.choices[0].message.content).keys() == {"name", "age"}
