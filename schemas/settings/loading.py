"""Load the settings from file, environment and flags, and convert them to the environment of a child process."""

from __future__ import annotations

import codecs
import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError

from schemas.settings.sections import Settings

PREFIX = "AURORA_"
FILE = Path("aurora.toml")
_KEYS = {section: field.annotation.model_fields for section, field in Settings.model_fields.items()}  # type: ignore[union-attr]
_SECRETS = tuple(
    f"{section}.{key}"
    for section, fields in _KEYS.items()
    for key, field in fields.items()
    if field.annotation in (SecretStr, dict[str, str])
)
"""Settings whose values no message shows."""

_SERVICE_LINK = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
"""Variables that Kubernetes sets for each Service of a namespace: a Service ``aurora-serve`` sets
``AURORA_SERVE_PORT=tcp://..``."""


class SettingsError(ValueError):
    """An invalid setting; the message names the setting, its source and the fix."""


def load(
    file: Path | None = None, environ: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None
) -> Settings:
    """Return the settings from the file, the environment and the flags; a later source overrides an earlier one.

    Variables whose names cannot be settings are ignored, unless they resemble one: other programs set variables too.

    Args:
        file: Settings file, which must exist; None reads ``aurora.toml`` of the working folder if there is one.
        environ: Environment variables; None reads those of the process.
        flags: Values by dotted name, such as ``serve.port``; None values are ignored.

    Raises:
        SettingsError: the file is unreadable, a key is unknown, or a value is invalid.
    """
    values = _read_file(file)
    # Sorted: a variable of options comes before those of single ones, which are inserted into it.
    for name, value in sorted((os.environ if environ is None else environ).items()):
        if name.startswith(PREFIX) and _names_setting(name, value):
            _insert(values, name.removeprefix(PREFIX).lower().split("__"), value, name)
    for name, value in (flags or {}).items():
        if value is not None:
            _insert(values, name.split("."), value, f"flag {name}")
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(e) for e in error.errors())) from error


def to_environ(settings: Settings) -> dict[str, str]:
    """Return the settings as ``AURORA_*`` variables, from which a child process loads equal settings."""
    return {
        _variable(section, key): _to_text(value)
        for section, values in settings.model_dump().items()
        for key, value in values.items()
    }


def _variable(section: str, key: str) -> str:
    return f"{PREFIX}{section}__{key}".upper()


def _to_text(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _read_file(file: Path | None) -> dict[str, Any]:
    if file is None and not FILE.exists():
        return {}
    path = file or FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise SettingsError(f"{path}: no such settings file") from error
    except OSError as error:  # a folder, or a file of another user
        raise SettingsError(f"{path}: not a readable settings file: {error.strerror}") from error
    try:
        return tomllib.loads(_decode(content))
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from error


def _decode(content: bytes) -> str:
    """Return a file's text: UTF-8, or UTF-16 with the byte order mark that Windows' editors write."""
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf_16 else "utf-8-sig")


def _names_setting(name: str, value: str) -> bool:
    """Return whether a variable is meant as a setting.

    Raises:
        SettingsError: it names no setting, but nearly one.
    """
    if "__" in name.removeprefix(PREFIX):
        return True
    if not (_SERVICE_LINK.search(name) or _SERVICE_ADDRESS.match(value)) and (nearest := _nearest_variable(name)):
        raise SettingsError(f"{name}: a setting is named SECTION__KEY; did you mean {nearest!r}?")
    return False


def _nearest_variable(name: str) -> str | None:
    known = [_variable(section, key) for section, fields in _KEYS.items() for key in fields]
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.85)), None)


def _insert(values: dict[str, Any], path: list[str], value: Any, source: str) -> None:
    """Insert a value under its section and key."""
    if len(path) < 2 or not all(path):
        raise SettingsError(f"{source}: a setting has a section and a key, such as kafka.bootstrap_servers")
    for part in path[:-1]:
        inner = _read_table(values.get(part, {}))
        if not isinstance(inner, dict):
            raise SettingsError(f"{source}: {part!r} is a value, not a section")
        values[part] = inner
        values = inner
    values[path[-1]] = value


def _read_table(value: Any) -> Any:
    """Return the table that a variable holds as JSON; every other value as it is."""
    if not isinstance(value, str):
        return value
    with suppress(ValueError):
        if isinstance(table := json.loads(value), dict):
            return table
    return value


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    name = ".".join(path) or "settings"
    if error["type"] != "extra_forbidden":
        found = "" if name.startswith(_SECRETS) else f" (found {error['input']!r})"
        return f"{name}: {error['msg']}{found}" if path else str(error["msg"])
    known = list(_KEYS[path[0]] if len(path) > 1 else _KEYS)
    nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
    hint = f"did you mean {'.'.join([*path[:-1], nearest[0]])!r}?" if nearest else f"known keys: {', '.join(known)}"
    return f"{name}: unknown setting; {hint}"
