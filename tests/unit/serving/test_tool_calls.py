"""Tool calls in streamed text: the parts joined are the whole, wherever the text is split."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.http.tool_calls import HermesParser, LlamaParser, Parsed, ToolCallParser

HERMES = [
    'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": [1, "é🙂"]}}\n</tool_call>',
    '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g", "arguments": {"x":1}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {}}</tool_call> and then  ',
    '<tool_call>{"name": "f", "arguments": 3}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {}}',
    '<tool_call>{"name": "f", "argum',
    "a < b <tool_ca <tool_call <tool_call>",
    "  plain text \n ",
    "",
]
LLAMA = [
    '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
    ' {"name": "f", "parameters": {"a": "}"}} then text',
    '{"name": "f"} is no call',
    '{"name": "f", "parameters": {',
    'text {"name": "f", "parameters": {}}',
    "  ",
]
CASES = [(HermesParser, text) for text in HERMES] + [(LlamaParser, text) for text in LLAMA]


def read(parser: ToolCallParser, parts: list[str]) -> tuple[str, list[tuple[int, str, str]]]:
    found: list[Parsed] = [parser.feed(part) for part in parts] + [parser.feed("", final=True)]
    calls = [(call.index, call.name, call.arguments) for one in found for call in one.calls]
    return "".join(one.text for one in found), calls


@pytest.mark.parametrize(("kind", "text"), CASES)
def test_every_split_gives_the_same_text_and_calls(kind: type[ToolCallParser], text: str) -> None:
    whole = read(kind(), [text])
    assert read(kind(), list(text)) == whole
    for at in range(len(text)):
        assert read(kind(), [text[:at], text[at:]]) == whole


pieces = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", "arguments": {}}',
        '{"name": "g", "parameters": {"a": "b"}}',
        "{",
        "}",
        *("; ", "\n", " ", "text", "<", "tool_call>"),
    ]
)


@given(st.sampled_from([HermesParser, LlamaParser]), st.lists(st.lists(pieces).map("".join)))
def test_any_parts_give_what_the_whole_gives(kind: type[ToolCallParser], parts: list[str]) -> None:
    assert read(kind(), parts) == read(kind(), ["".join(parts)])


@given(st.sampled_from([HermesParser, LlamaParser]), st.text(st.characters(exclude_characters="<{")))
def test_text_without_calls_stays_as_it_is(kind: type[ToolCallParser], text: str) -> None:
    assert read(kind(), [text]) == (text, [])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (HERMES[0], "Let me see.", [("f", {"a": [1, "é🙂"]})]),
        (HERMES[1], "", [("f", {}), ("g", {"x": 1})]),
        (HERMES[2], "and then  ", [("f", {})]),
        (HERMES[3], HERMES[3], []),
        (HERMES[4], HERMES[4], []),
        (HERMES[5], HERMES[5], []),
        (HERMES[6], "", [("f", {})]),
        (HERMES[7], HERMES[7], []),
        (HERMES[8], HERMES[8], []),
    ],
)
def test_malformed_calls_stay_text(text: str, content: str, calls: list[tuple[str, object]]) -> None:
    shown, found = read(HermesParser(), [text])
    assert shown.strip() == content.strip()
    assert [(name, json.loads(arguments)) for _, name, arguments in found] == calls


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (LLAMA[0], "", ["f", "g"]),
        (LLAMA[1], " then text", ["f"]),
        (LLAMA[2], LLAMA[2], []),
        (LLAMA[3], LLAMA[3], []),
        (LLAMA[4], LLAMA[4], []),
    ],
)
def test_llama_calls_come_first(text: str, content: str, names: list[str]) -> None:
    shown, found = read(LlamaParser(), [text])
    assert (shown, [name for _, name, _ in found]) == (content, names)


def test_without_parallel_calls_only_the_first_counts() -> None:
    assert [name for _, name, _ in read(HermesParser(parallel=False), [HERMES[1]])[1]] == ["f"]
