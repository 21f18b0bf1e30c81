"""Tools of a chat request: their definitions, the format in which the target calls them, and its grammar."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from schemas.settings.sections import ToolCallParserName
from serving.http.api_object import ApiObject
from serving.http.tool_calls import HermesParser, LlamaParser, ToolCallParser


class FunctionDefinition(ApiObject):
    """A function that the model may call."""

    ignored = frozenset({"strict"})

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] = Field(default={})
    """JSON schema of the arguments."""


class Tool(ApiObject):
    """A tool of a request; only functions are supported."""

    type: Literal["function"] = "function"
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """Return the tool for a chat template, with the fields that the client sent."""
        return {"type": self.type, "function": self.function.model_dump(exclude_unset=True)}


class NamedFunction(ApiObject):
    """The name of a function."""

    name: str


class _ToolChoiceObject(ApiObject):
    type: Literal["none", "auto", "required", "function"]
    function: NamedFunction | None = None

    @model_validator(mode="after")
    def _check_function(self) -> _ToolChoiceObject:
        if (self.type == "function") != (self.function is not None):
            raise PydanticCustomError("needs", "belongs to type 'function'", {"param": "function"})
        return self


def _as_object(choice: Any) -> Any:
    return {"type": choice} if isinstance(choice, str) and choice != "function" else choice


ToolChoice = Annotated[_ToolChoiceObject, BeforeValidator(_as_object)]
"""Whether the model calls a function: a word, or the function that it must call."""


@dataclass(frozen=True, slots=True)
class ToolCallFormat:
    """How a target writes calls."""

    parser: type[ToolCallParser]
    begin: str
    end: str
    separator: str
    arguments: str
    """Key of the arguments."""


FORMATS: dict[str, ToolCallFormat] = {
    "hermes": ToolCallFormat(HermesParser, "<tool_call>\n", "\n</tool_call>", "\n", "arguments"),
    "llama3_json": ToolCallFormat(LlamaParser, "", "", "; ", "parameters"),
}


def choose_format(chat_template: Any, setting: ToolCallParserName) -> ToolCallFormat | None:
    """Return the format of a target's calls; None if its chat template has no tools, or shows no known format.

    Args:
        chat_template: A template, or several by name.
        setting: ``serve.tool_call_parser``.
    """
    text = str(chat_template)
    if not re.search(r"\btools\b", text):
        return None
    if setting != "auto":
        return FORMATS[setting]
    if "<tool_call>" in text:
        return FORMATS["hermes"]
    return FORMATS["llama3_json"] if re.search(r"[\"']parameters\\?[\"']", text) else None


def calls_grammar(tools: list[Tool], form: ToolCallFormat, *, parallel: bool) -> list[dict[str, Any]]:
    """Return llguidance grammars of one or several calls; the first has the rule ``calls``.

    The arguments of each function are a grammar of their own, so that references in its schema stay valid.
    """
    function = " | ".join(f"function_{i}" for i in range(len(tools)))
    rules = [f"calls: call ({_quote(form.separator)} call)*" if parallel else "calls: call"]
    rules += [f"call: {_quote(form.begin)} ({function}) {_quote(form.end)}"]
    grammars: list[dict[str, Any]] = []
    for i, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.function.name)}, "{form.arguments}": '
        rules.append(f'function_{i}: {_quote(head)} @arguments_{i} "}}"')
        schema = {"type": "object"} | tool.function.parameters
        grammars.append({"name": f"arguments_{i}", "json_schema": json_grammar(schema)})
    return [{"lark_grammar": "\n".join(rules)}, *grammars]


def json_grammar(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema for llguidance: JSON on one line, as ``json.dumps`` writes it.

    One way to write each value makes more tokens forced, and keeps a target from writing spaces without end.
    """
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return {"x-guidance": style} | schema


def _quote(text: str) -> str:
    return json.dumps(text)
