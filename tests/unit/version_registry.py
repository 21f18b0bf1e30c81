"""A registry in memory, with a few versions of one speculator line."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from tiny_draft import SHAPE

from schemas.speculator import checkpoint
from schemas.speculator.checkpoint import line_of
from schemas.speculator.network import random_draft
from serving.puller import RegistryError

TARGET = "f" * 32
DRAFTS = {str(n): random_draft(SHAPE, seed=n) for n in range(1, 5)}
LINE = line_of(TARGET, SHAPE, DRAFTS["1"].d2t)


def _set() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@dataclass
class FakeRegistry:
    alias: str | None = None
    away: bool = False
    foreign: set[str] = field(default_factory=set)
    downloads: list[str] = field(default_factory=list)
    open: threading.Event = field(default_factory=_set)
    """Downloads wait while it is clear."""

    def named(self, alias: str) -> str | None:
        assert alias == "champion"
        if self.away:
            raise RegistryError("connection refused")
        return self.alias

    def has(self, version: str) -> bool:
        if self.away:
            raise RegistryError("connection refused")
        return version in DRAFTS

    def download(self, version: str, folder: Path) -> Path:
        self.downloads.append(version)
        self.open.wait(10)
        if self.away:
            raise RegistryError("connection reset")
        checkpoint.write(DRAFTS[version], folder / "draft", TARGET if version not in self.foreign else "0" * 32)
        return folder / "draft"
