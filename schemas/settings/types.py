"""Types of settings: durations, secrets, and options of clients and stores."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, SecretStr

MASK = "**********"
"""Shown in place of a secret."""
_MASK_ERROR = "is the mask that `aurora config show` prints in place of a secret; write the secret itself"
DURATION = re.compile(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*(ms|s|m|h|d)?")
"""The text of a duration: a number and its unit."""
_SECRET_WORDS = ("secret", "password", "key", "token", "authorization")
_UNUSABLE = re.compile(r"[\[\]^|\\\x00-\x1f]|%[0-9A-Fa-f]{2}")
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
    duration = DURATION.fullmatch(value.strip())
    if duration is None:
        raise ValueError("not a duration; write seconds, or a number with a unit such as 500ms, 30s, 5m, 2h or 14d")
    return float(duration[1]) * _UNIT_SECONDS[duration[2] or "s"]


def strip_listener(servers: str) -> str:
    """Return broker addresses without ``PLAINTEXT://``, as Kafka writes its listeners and not every client reads them.

    Raises:
        ValueError: an address names another protocol, which the clients take from an option.
    """
    found = [server.strip().rpartition("://") for server in servers.split(",")]
    for protocol, _, server in found:
        if protocol and protocol.upper() != "PLAINTEXT":
            raise ValueError(
                f"{protocol}://{server}: write {server}, and the protocol as security.protocol in kafka.client_options"
            )
    return ",".join(server for _, _, server in found)


def expand_home(path: str) -> str:
    """Return a path with the home folder in place of a leading ``~``."""
    return os.path.expanduser(path)  # noqa: PTH111 - a Path would lose "" and the end of "dir/"


def normalize_location(location: str) -> str:
    """Return a folder without ``file:`` and ``~``; every other address as it is.

    Raises:
        ValueError: the folder is on another host, or its name cannot be part of an address.
    """
    if location.startswith("file:"):
        address = urlsplit(location)
        if address.netloc not in ("", "localhost"):
            raise ValueError("a folder of this machine is file:///path, with three slashes")
        location = unquote(address.path)
    if "://" not in location and (unusable := _UNUSABLE.search(location)):
        raise ValueError(f"the Delta library cannot open a folder with {unusable[0]!r} in its name; rename it")
    return expand_home(location)


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

LocalPath = Annotated[str, AfterValidator(expand_home)]
"""A file or folder of this machine, which may begin with ``~``; empty has a meaning of its own."""

Location = Annotated[str, Field(min_length=1), AfterValidator(normalize_location)]
"""A folder, or a prefix in an object store."""

Secret = Annotated[SecretStr, AfterValidator(_reject_mask)]
"""A secret, masked in all output."""

Options = Annotated[
    dict[str, str],
    BeforeValidator(_parse_table),
    AfterValidator(_reject_masks),
    PlainSerializer(mask_secrets, when_used="json"),
]
"""Options of a client or store; secrets among them are masked in all output."""
