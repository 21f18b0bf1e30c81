"""Versions that a node has at hand: each is downloaded and checked once, and one that is at fault is refused for good.

What is kept is a draft in float32, 40 MB for SmolLM2-135M with 8,192 draft tokens. It is kept while a canary is
served by turns, and dropped otherwise: the engine holds its own copy of what it drafts with.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import CheckpointError
from schemas.speculator.network import EagleDraft
from serving.engines.base import HotSwapEngine
from serving.versions.alias_policy import Named

log = structlog.get_logger()


class RegistryError(RuntimeError):
    """The registry cannot be reached, or does not give what it should; another try may go well."""


class UnknownVersionError(RegistryError):
    """The line has no such version."""


class RefusedError(RuntimeError):
    """The version is at fault, and this node will not serve it."""


class Registry(Protocol):
    """Where versions come from."""

    def named(self) -> Named:
        """What the aliases of the line name, and what the record says of them; nothing where there is no such model.

        Raises:
            RegistryError: no answer.
        """

    def has(self, version: str) -> bool:
        """Whether the line has this version.

        Raises:
            RegistryError: no answer.
        """

    def download(self, version: str, folder: Path) -> Path:
        """The version's files, in a folder below the given one.

        Raises:
            RegistryError: not everything could be fetched.
        """


@dataclass(frozen=True, slots=True)
class Refusal:
    """A version that is not served, and why."""

    version: str
    time: float
    why: str


class Shelf:
    """Brings versions, and keeps those that are asked for again and again."""

    def __init__(self, registry: Registry, engine: HotSwapEngine) -> None:
        self._registry = registry
        self._engine = engine
        self._drafts: dict[str, EagleDraft] = {}
        self._refused: dict[str, Refusal] = {}

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """Versions that this node will not serve."""
        return tuple(self._refused.copy().values())

    def refuses(self, version: str) -> bool:
        """Whether the version is at fault."""
        return version in self._refused

    def has(self, version: str | None) -> bool:
        """Whether the version is at hand."""
        return version in self._drafts

    def draft(self, version: str) -> EagleDraft:
        """A version that is at hand."""
        return self._drafts[version]

    def bring(self, version: str) -> None:
        """See that a version is at hand.

        Raises:
            RefusedError: it is at fault.
            RegistryError: it cannot be fetched.
        """
        if version not in self._drafts and version not in self._refused:
            self._fetch(version)
        if version in self._refused:
            raise RefusedError(f"version {version} is refused: {self._refused[version].why}")

    def keep(self, versions: Container[str | None]) -> None:
        """Drop all others."""
        for version in [version for version in self._drafts if version not in versions]:
            del self._drafts[version]

    def _fetch(self, version: str) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="aurora-version-") as folder:
                draft = checkpoint.read(self._registry.download(version, Path(folder)), self._engine.line)
            self._engine.check(draft)
        except CheckpointError as error:
            log.warning("version_refused", version=version, why=str(error))
            self._refused[version] = Refusal(version, time.time(), str(error))
        else:
            self._drafts[version] = draft
