"""Messages of a chat request, and what a chat template gets of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from serving.http.api_object import ApiObject


class TextPart(ApiObject):
    """A part of a message's content; only texts are supported."""

    type: Literal["text"]
    text: str


def _parse_arguments(arguments: Any) -> Any:
    """Return the arguments of a call from their JSON text; templates need the object. A call may have none."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise PydanticCustomError("unsupported_value", "is not the JSON text of an object") from error


class FunctionCall(ApiObject):
    """The function that a model has called."""

    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_parse_arguments)] = Field(default={})


class ToolCallMessage(ApiObject):
    """A call that an assistant's message of the history contains."""

    ignored = frozenset({"index"})

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


def _as_parts(content: Any) -> Any:
    """Return the parts of a content; a text is one part."""
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        return parts
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


class Message(ApiObject):
    """One message of the conversation."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "refusal": (),
        "audio": (),
        "annotations": ([],),
        "function_call": (),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart] | None, BeforeValidator(_as_parts)] = None
    name: str | None = None
    reasoning: str | None = None
    """Of an earlier answer by a server that reports it apart from the content, as vLLM does."""
    tool_calls: list[ToolCallMessage] = Field(default=[])
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        if self.reasoning is not None and self.role != "assistant":
            raise PydanticCustomError("misplaced", "belongs to role 'assistant'", {"param": "reasoning"})
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("misplaced", "belongs to role 'assistant'", {"param": "tool_calls"})
        if self.tool_call_id is not None and self.role != "tool":
            raise PydanticCustomError("misplaced", "belongs to role 'tool'", {"param": "tool_call_id"})
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("missing", "is missing", {"param": "content"})
        return self

    def for_template(self) -> dict[str, Any]:
        """Return the message for a chat template.

        As in vLLM, the texts of several parts are separate lines, and a message with calls alone has an empty content.
        Templates have no developer role: such a message is the system's.
        """
        fields = self.model_dump(include={"name", "tool_call_id"}, exclude_none=True)
        if self.reasoning is not None:
            # Templates know either name.
            fields |= {"reasoning": self.reasoning, "reasoning_content": self.reasoning}
        if self.tool_calls:
            fields["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join(part.text for part in self.content or ())} | fields
