"""Reads the settings from file, environment and flags, and writes them down for a process that is started."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr, ValidationError

from schemas.settings.sections import Settings

PREFIX = "AURORA_"
FILE = Path("aurora.toml")
_SECRETS = (
    "serve.admin_token",
    "serve.webhook_secret",
    "registry.password",
    "sglang.api_key",
    "kafka.client_options",
    "tables.storage_options",
    "traces.claim_check_options",
    "telemetry.headers",
)
"""Settings whose values no message shows."""


class SettingsError(ValueError):
    """A setting that cannot be used; the message says which, where it was read, and what to write instead."""


def load(
    file: Path | None = None, environ: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> Settings:
    """Settings from the file, the environment and the flags, the later ones first in rank.

    Args:
        file: ``aurora.toml`` of the working folder where None; a named file must exist.
        environ: The process's environment where None.
        flags: Dotted names to values; None values are flags that were not given.

    Raises:
        SettingsError: unreadable file, unknown key, or a value of the wrong kind.
    """
    merged = _read_file(file)
    for name, value in (os.environ if environ is None else environ).items():
        if name.startswith(PREFIX):
            _put(merged, name.removeprefix(PREFIX).lower().split("__"), value, name)
    for name, value in (flags or {}).items():
        if value is not None:
            _put(merged, name.split("."), value, f"flag {name}")
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(e) for e in error.errors())) from error


def to_environ(settings: Settings) -> dict[str, str]:
    """The settings as ``AURORA_*`` variables, so that a started process reads exactly what its parent read."""
    return {
        f"{PREFIX}{section}__{key}".upper(): _to_text(value)
        for section, values in settings.model_dump().items()
        for key, value in values.items()
    }


def _to_text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _read_file(file: Path | None) -> dict[str, Any]:
    if file is None and not FILE.exists():
        return {}
    path = file or FILE
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise SettingsError(f"{path}: no such settings file") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error


def _put(tree: dict[str, Any], path: list[str], value: Any, source: str) -> None:
    if len(path) < 2 or not all(path):
        raise SettingsError(f"{source}: a setting is named SECTION__KEY, as in {PREFIX}KAFKA__BOOTSTRAP")
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise SettingsError(f"{source}: {part!r} is a value, not a section")
    tree[path[-1]] = value


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path) or "settings"
    if error["type"] != "extra_forbidden":
        found = "" if name.startswith(_SECRETS) else f" (found {error['input']!r})"
        return f"{name}: {error['msg']}{found}" if path else str(error["msg"])
    known = _known_keys(path[:-1])
    nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
    hint = f"did you mean {'.'.join([*path[:-1], nearest[0]])!r}?" if nearest else f"known keys: {', '.join(known)}"
    return f"{name}: unknown setting; {hint}"


def _known_keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in path:
        annotation = model.model_fields[part].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)
