"""A registry in memory, with a few versions of one speculator line."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from tiny_draft import SHAPE

from schemas.events import Alias, AuditState
from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import line_name
from schemas.speculator.network import random_draft
from serving.versions.alias_policy import RegistryAnswer
from serving.versions.cache import RegistryError

TARGET = "f" * 32
DRAFTS = {str(n): random_draft(SHAPE, seed=n) for n in range(1, 5)}
LINE = line_name(TARGET, SHAPE, DRAFTS["1"].d2t)


def _set() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@dataclass
class FakeRegistry:
    alias: str | None = None
    canary: str | None = None
    previous: str | None = None
    audited: AuditState | None = None
    unreadable: str | None = None
    unreachable: bool = False
    foreign: set[str] = field(default_factory=set)
    polls: int = 0
    downloads: list[str] = field(default_factory=list)
    broken: bool = False
    """Downloads fail while it is set."""
    answering: threading.Event = field(default_factory=_set)
    """Reads of the aliases wait while it is clear."""
    open: threading.Event = field(default_factory=_set)
    """Downloads wait while it is clear."""

    def record_audit(self) -> None:
        """Write the audit state of the current aliases, as a promoter does."""
        self.audited = AuditState(moves=self.audited.moves + 1 if self.audited else 1, aliases=self._aliases())

    def read_aliases(self) -> RegistryAnswer:
        self.polls += 1
        self.answering.wait(10)
        if self.unreachable:
            raise RegistryError("connection refused")
        return RegistryAnswer(dict(self._aliases()), self.audited, self.unreadable)

    def _aliases(self) -> dict[Alias, str]:
        named: dict[Alias, str | None] = {"champion": self.alias, "canary": self.canary, "previous": self.previous}
        return {alias: version for alias, version in named.items() if version is not None}

    def has_version(self, version: str) -> bool:
        if self.unreachable:
            raise RegistryError("connection refused")
        return version in DRAFTS

    def download(self, version: str, folder: Path) -> Path:
        self.downloads.append(version)
        self.open.wait(10)
        if self.unreachable or self.broken:
            raise RegistryError("connection reset")
        checkpoint.write_checkpoint(
            DRAFTS[version], folder / "draft", TARGET if version not in self.foreign else "0" * 32
        )
        return folder / "draft"
