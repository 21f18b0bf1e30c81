"""Settings that are secrets: kept as they are, and masked wherever they are shown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, SecretStr

MASK = "**********"
_SECRET_WORDS = ("secret", "password", "key", "token", "authorization")


def _from_json(value: Any) -> Any:
    """Variables carry tables as JSON text."""
    return json.loads(value) if isinstance(value, str) else value


def _no_mask(secret: SecretStr) -> SecretStr:
    """What is printed in a secret's place must never become the secret."""
    if set(secret.get_secret_value()) == {"*"}:
        raise ValueError("this is what `aurora settings` prints in place of a secret; write the secret itself")
    return secret


def _no_masks(options: dict[str, str]) -> dict[str, str]:
    if masked := [name for name, value in options.items() if _is_secret(name) and value and set(value) == {"*"}]:
        raise ValueError(f"{masked[0]} is what `aurora settings` prints in place of a secret; write the secret itself")
    return options


def _is_secret(option: str) -> bool:
    """Whether the value of an option of a client or a store is to be hidden, judged by the option's name."""
    return any(word in option.lower() for word in _SECRET_WORDS)


def masked(options: Mapping[str, str]) -> dict[str, str]:
    """Options with a mask in the place of every secret."""
    return {name: MASK if _is_secret(name) and value else value for name, value in options.items()}


Secret = Annotated[SecretStr, AfterValidator(_no_mask)]
Options = Annotated[
    dict[str, str],
    BeforeValidator(_from_json),
    AfterValidator(_no_masks),
    PlainSerializer(masked, when_used="json"),
]
"""Options of a client or a store; passwords and keys among them are masked wherever they are shown."""
