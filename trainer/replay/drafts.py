"""Drafts by the names that people give them: a number or an alias of the registry, ``day-0``, or a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import UserError
from schemas.settings import DAY_0, Settings
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from trainer.data.target import Target
from trainer.release.registry import RegistryError, SpeculatorRegistry


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """A draft, as it was asked for and as it is."""

    name: str
    version: str
    """Number in the registry, that of day 0, or the folder."""
    draft: EagleDraft

    @property
    def short(self) -> str:
        """The name for a narrow place: of a folder the end of its path."""
        return str(Path(*Path(self.name).parts[-2:])) if self.name == self.version else self.name

    def __str__(self) -> str:
        return self.name if self.name == self.version else f"{self.name} ({self.version})"


def drafts(settings: Settings, target: Target, names: Sequence[str]) -> list[Named]:
    """The drafts of these names, each one of the target's line.

    Raises:
        UserError: no such version, alias or folder, one that is not of the line, or no registry to ask.
    """
    return [_named(settings, target, name) for name in names]


def _named(settings: Settings, target: Target, name: str) -> Named:
    day_0 = settings.speculator.day_0
    if name in (DAY_0, day_0):
        return Named(name, day_0, target.new_draft())
    try:
        if Path(name).is_dir():
            return Named(name, name, checkpoint.read(Path(name), target.line))
        return _registered(SpeculatorRegistry(settings.registry), target, name)
    except CheckpointError as error:
        raise UserError(f"version {name}: {error}") from error
    except RegistryError as error:
        raise UserError(f"version {name}: {error}; {DAY_0} and folders need no registry") from error


def _registered(registry: SpeculatorRegistry, target: Target, name: str) -> Named:
    version = name
    if not name.isdecimal():
        aliases = registry.aliases(target.line)
        if name not in aliases:
            known = ", ".join([*sorted(aliases), DAY_0])
            raise UserError(f"version {name}: no folder, and no alias of line {target.line}; there are {known}")
        version = aliases[name]
    with tempfile.TemporaryDirectory() as folder:
        draft = checkpoint.read(registry.download(target.line, version, Path(folder)), target.line)
    return Named(name, version, draft)
