"""Which speculator line and which version a command is about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from schemas.errors import UserError
from schemas.events import ALIASES
from schemas.settings import Settings

if TYPE_CHECKING:
    from trainer.release.registry import Line, SpeculatorRegistry, Version


def connect(settings: Settings) -> SpeculatorRegistry:
    """The registry, once it has answered.

    Raises:
        UserError: it does not.
    """
    from trainer.release.registry import RegistryError, SpeculatorRegistry

    registry = SpeculatorRegistry(settings.registry)
    try:
        registry.lines()
    except RegistryError as error:
        raise UserError(f"{error}; start it, or set registry.tracking_uri") from error
    return registry


def line_of(settings: Settings, registry: SpeculatorRegistry, named: str | None) -> Line:
    """The line that was named; else that of the settings; else the only one there is.

    Raises:
        UserError: there is no such line, or several to choose from; they are named.
    """
    lines = {line.name: line for line in registry.lines()}
    if not lines:
        raise UserError(
            f"no versions at {settings.registry.tracking_uri} (registry.tracking_uri); the trainer registers them"
        )
    if named is not None:
        if found := lines.get(named):
            return found
        raise UserError(f"no line {named!r} at {settings.registry.tracking_uri}; there are {', '.join(sorted(lines))}")
    if len(lines) == 1:
        return next(iter(lines.values()))
    ours = _line_of_settings(settings)
    if ours in lines:
        return lines[ours]
    raise UserError(f"--line: none of the lines is that of target.path; there are {', '.join(sorted(lines))}")


def version_of(registry: SpeculatorRegistry, line: Line, named: str) -> Version:
    """The version that a number or an alias names.

    Raises:
        UserError: the line has none.
    """
    number = line.aliases.get(named, named)
    if named in ALIASES and named not in line.aliases:
        raise UserError(f"line {line.name}: no version is {named}; {_named(line)}")
    found = registry.version(line.name, number) if number.isdecimal() else None
    if found is None:
        raise UserError(f"line {line.name} has no version {named!r}; `aurora versions list` shows them")
    return found


def _named(line: Line) -> str:
    return ", ".join(f"{alias} is {version}" for alias, version in line.aliases.items()) or "no alias names one"


def _line_of_settings(settings: Settings) -> str | None:
    from schemas.speculator.checkpoint import CheckpointError
    from schemas.speculator.initial_draft import read_line

    try:
        return read_line(Path(settings.target.path), settings.speculator).name
    except CheckpointError:
        return None  # a machine without the target: the line has to be named where there are several
