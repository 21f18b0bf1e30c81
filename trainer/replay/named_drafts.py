"""Load drafts by name: a number or an alias of the registry, ``day-0``, or a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from schemas.errors import UserError
from schemas.settings import DAY_0, Settings
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from trainer.data.target import Target
from trainer.release.evaluation import read_draft
from trainer.release.registry import RegistryError, SpeculatorRegistry


@dataclass(frozen=True, slots=True, eq=False)
class NamedDraft:
    """A draft, the name that was given for it, and the version that the name resolves to."""

    name: str
    version: str
    """Number in the registry, version of day 0, or folder."""
    draft: EagleDraft
    context_tokens: int | None = None
    """``train.context_tokens`` of the nodes; None for all of a prompt."""

    @property
    def short(self) -> str:
        """The name for a narrow column: of a folder, the end of its path."""
        return str(Path(*Path(self.name).parts[-2:])) if self.name == self.version else self.name

    def __str__(self) -> str:
        return self.name if self.name == self.version else f"{self.name} ({self.version})"


def load_drafts(settings: Settings, target: Target, names: Sequence[str]) -> list[NamedDraft]:
    """Load the drafts of the given names; all of the target's line.

    Raises:
        UserError: an unknown version, alias or folder, a draft of another line, or an unreachable registry.
    """
    limit = settings.train.context_tokens
    return [replace(_load(settings, target, name), context_tokens=limit) for name in names]


def _load(settings: Settings, target: Target, name: str) -> NamedDraft:
    day_0 = settings.speculator.day_0
    if name in (DAY_0, day_0):
        return NamedDraft(name, day_0, target.new_draft())
    try:
        if Path(name).is_dir():
            return NamedDraft(name, name, checkpoint.read_checkpoint(Path(name), target.line))
        return _download(SpeculatorRegistry(settings.registry), target, name)
    except CheckpointError as error:
        raise UserError(f"version {name}: {error}") from error
    except RegistryError as error:
        raise UserError(f"version {name}: {error}; {DAY_0} and folders need no registry") from error


def _download(registry: SpeculatorRegistry, target: Target, name: str) -> NamedDraft:
    version = name
    if not name.isdecimal():
        aliases = registry.aliases(target.line)
        if name not in aliases:
            known = ", ".join([*sorted(aliases), DAY_0])
            raise UserError(f"version {name}: no such folder, and no alias of line {target.line}; aliases are {known}")
        version = aliases[name]
    return NamedDraft(name, version, read_draft(registry, target.line, version))
