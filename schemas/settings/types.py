"""Types of settings: durations, secrets, and options of clients and stores."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, SecretStr

MASK = "**********"
"""Shown in place of a secret."""
_MASK_ERROR = "is the mask that `aurora config show` prints in place of a secret; write the secret itself"
_SECRET_WORDS = ("secret", "password", "key", "token", "authorization")
_DURATION = re.compile(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*(ms|s|m|h|d)?")
_UNIT_SECONDS = {"ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86_400}


class Section(BaseModel):
    """A section of the settings: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, mask_secrets(value) if isinstance(value, dict) else value


def mask_secrets(options: Mapping[str, str]) -> dict[str, str]:
    """Return the options with a mask in place of every secret."""
    return {name: MASK if _is_secret(name) and value else value for name, value in options.items()}


def parse_duration(value: Any) -> Any:
    """Return the seconds of a text such as ``30s``; pydantic validates every other value.

    Raises:
        ValueError: the text is not a duration.
    """
    if not isinstance(value, str):
        return value
    duration = _DURATION.fullmatch(value.strip())
    if duration is None:
        raise ValueError("not a duration; write seconds, or a number with a unit such as 500ms, 30s, 5m, 2h or 14d")
    return float(duration[1]) * _UNIT_SECONDS[duration[2] or "s"]


def _parse_table(value: Any) -> Any:
    """Return a table from its JSON text, the form that environment variables use."""
    return json.loads(value) if isinstance(value, str) else value


def _is_secret(option: str) -> bool:
    """Return whether the name of an option indicates a secret value."""
    return any(word in option.lower() for word in _SECRET_WORDS)


def _is_mask(value: str) -> bool:
    return set(value) == {"*"}


def _reject_mask(secret: SecretStr) -> SecretStr:
    if _is_mask(secret.get_secret_value()):
        raise ValueError(f"this {_MASK_ERROR}")
    return secret


def _reject_masks(options: dict[str, str]) -> dict[str, str]:
    for name, value in options.items():
        if _is_secret(name) and _is_mask(value):
            raise ValueError(f"{name} {_MASK_ERROR}")
    return options


Duration = Annotated[float, BeforeValidator(parse_duration), Field(allow_inf_nan=False)]
"""A time span: seconds in code; in files, variables and flags also a number with a unit, such as ``500ms`` or
``14d``."""

Secret = Annotated[SecretStr, AfterValidator(_reject_mask)]
"""A secret, masked in all output."""

Options = Annotated[
    dict[str, str],
    BeforeValidator(_parse_table),
    AfterValidator(_reject_masks),
    PlainSerializer(mask_secrets, when_used="json"),
]
"""Options of a client or store; secrets among them are masked in all output."""
