"""Structured outputs: what a request asks its answer to match, as a grammar.

``response_format`` is OpenAI's; ``structured_outputs`` and ``guided_json``, ``guided_regex``, ``guided_choice`` and
``guided_grammar`` are vLLM's, the last one in llguidance's variant of Lark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from llguidance import regex_to_lark
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from serving.http.api_object import ApiObject
from serving.http.tools import json_grammar


def _as_schema(schema: Any) -> Any:
    """Return a schema from its JSON text."""
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise PydanticCustomError("unsupported_value", "is not the JSON text of a schema") from error


Schema = Annotated[dict[str, Any], BeforeValidator(_as_schema)]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
_ANY_OBJECT = {"type": "object"}


class JsonSchemaFormat(ApiObject):
    """A named JSON schema of ``response_format``."""

    ignored = frozenset({"description", "strict"})

    name: str
    json_schema: dict[str, Any] = Field(default=_ANY_OBJECT, alias="schema")


class ResponseFormat(ApiObject):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("needs", "belongs to type 'json_schema'", {"param": "json_schema"})
        return self


class StructuredOutputs(ApiObject):
    """vLLM's ``structured_outputs``."""

    ignored = frozenset({"disable_any_whitespace"})
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "disable_additional_properties": (False,),
        "whitespace_pattern": (),
        "structural_tag": (),
    }

    json_schema: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    json_object: bool = False


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the text of an answer must match."""

    param: str
    """The parameter that asks for it."""
    grammar: dict[str, Any]
    """A grammar in llguidance's JSON form."""


def list_constraints(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None, guided: StructuredOutputs
) -> list[Constraint]:
    """Return what the parameters ask for; a request may have one.

    Args:
        response_format: OpenAI's parameter.
        structured: vLLM's parameter.
        guided: vLLM's older parameters ``guided_json``, ``guided_regex``, ``guided_choice`` and ``guided_grammar``.
    """
    found = []
    if response_format is not None and response_format.type != "text":
        schema = response_format.json_schema.json_schema if response_format.json_schema else _ANY_OBJECT
        found.append(Constraint("response_format", {"json_schema": json_grammar(schema)}))
    for outputs, param in ((structured, "structured_outputs."), (guided, "guided_")):
        if outputs is not None:
            found += [Constraint(param + name, grammar) for name, grammar in _list_grammars(outputs)]
    return found


def _list_grammars(outputs: StructuredOutputs) -> Iterator[tuple[str, dict[str, Any]]]:
    if outputs.json_schema is not None:
        yield "json", {"json_schema": json_grammar(outputs.json_schema)}
    if outputs.json_object:
        yield "json_object", {"json_schema": json_grammar(_ANY_OBJECT)}
    if outputs.regex is not None:
        yield "regex", {"lark_grammar": "start: /" + regex_to_lark(outputs.regex).replace("\n", "\\n") + "/"}
    if outputs.choice is not None:
        yield "choice", {"lark_grammar": "start: " + " | ".join(map(json.dumps, outputs.choice))}
    if outputs.grammar is not None:
        yield "grammar", {"lark_grammar": outputs.grammar}


def join_grammars(answer: Constraint | None, calls: list[dict[str, Any]]) -> str:
    """Return the text of a grammar of an answer, of tool calls, or of either.

    Args:
        answer: What the text of an answer must match; None if it may not be text.
        calls: Grammars of ``tools.calls_grammar``; none if the answer may not be calls.
    """
    if not calls:
        assert answer is not None
        return json.dumps({"grammars": [answer.grammar]})
    rules, *arguments = calls
    start = "start: calls" if answer is None else "start: @answer | calls"
    joined = [{"lark_grammar": f"{start}\n{rules['lark_grammar']}"}, *arguments]
    if answer is not None:
        joined.append({"name": "answer"} | answer.grammar)
    return json.dumps({"grammars": joined})
