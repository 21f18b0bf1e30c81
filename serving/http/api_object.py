"""Objects of request bodies: null and neutral values ask for nothing, as in OpenAI's API and in vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class ApiObject(BaseModel):
    """An object of a request body, at any depth.

    A key with the value null is an absent one. Every other key is a field of the class, or one of ``ignored``, or one
    of ``unsupported`` with a neutral value; any other is an error that names it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ignored: ClassVar[frozenset[str]] = frozenset()
    """Keys without effect on the answer."""
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Known keys that this server cannot serve, with the neutral values: those that change nothing."""

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        used = {key: value for key, value in body.items() if value is not None and key not in cls.ignored}
        for name, neutral in cls.unsupported.items():
            if name in used and _drop_nulls(used.pop(name)) not in neutral:
                raise PydanticCustomError("unsupported", "is not supported", {"param": name})
        return used


def _drop_nulls(value: Any) -> Any:
    return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value


def check_texts(body: Any) -> None:
    """Check that every text of a parsed JSON value is Unicode: JSON can name half of a surrogate pair.

    Raises:
        PydanticCustomError: a text or a key is not; the error names the path to it.
    """
    unread: list[tuple[str, Any]] = [("", body)]
    while unread:
        path, value = unread.pop()
        if isinstance(value, str):
            _check_text(value, path)
        elif isinstance(value, list):
            unread += ((f"{path}.{i}", one) for i, one in enumerate(value) if not isinstance(one, int))
        elif isinstance(value, dict):
            for key, one in value.items():
                _check_text(key, path)
                unread.append((f"{path}.{key}", one))


def _check_text(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = "holds half of a surrogate pair, which is no text"
        raise PydanticCustomError("unsupported_value", message, {"param": path.lstrip(".")}) from error
