"""Command line of a server: the user's flags, and the draft that the node adds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_WILDCARDS = ("0.0.0.0", "::", "[::]")  # noqa: S104 - compared with, never bound


@dataclass(frozen=True, slots=True)
class Flags:
    """The user's flags, as ``--name value`` or ``--name=value``."""

    given: tuple[str, ...]

    def has(self, *names: str) -> bool:
        """Return whether one of the names is among the flags."""
        return any(flag.partition("=")[0] in names for flag in self.given)

    def value(self, *names: str) -> str | None:
        """Return the value of the last flag with one of the names; None without one."""
        found = None
        for flag, after in pairwise([*self.given, ""]):
            name, equals, value = flag.partition("=")
            if name in names:
                found = value if equals else after
        return found

    def url(self, default_port: int) -> str:
        """Return the address of the server, from this machine."""
        host = self.value("--host") or "127.0.0.1"
        if host in _WILDCARDS:
            host = "127.0.0.1"
        scheme = "https" if self.has("--ssl-certfile") else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.value('--port') or default_port}"


@dataclass(frozen=True, slots=True)
class DraftFolder:
    """The draft that a server starts with."""

    folder: Path
    version: str
