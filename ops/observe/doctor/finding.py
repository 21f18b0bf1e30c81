"""What a look at one thing comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from schemas.settings import Settings

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is as it should be, or is not."""

    about: str
    """Broker, topics, registry, .. : what was looked at."""
    level: Level
    """A ``problem`` keeps something from working; a ``warning`` may be meant."""
    found: str
    fix: str = ""
    """What to change, and where; empty where nothing is to be done."""


def ok(about: str, found: str) -> Finding:
    """All is well."""
    return Finding(about, "ok", found)


def warning(about: str, found: str, fix: str) -> Finding:
    """It may be meant so."""
    return Finding(about, "warning", found, fix)


def problem(about: str, found: str, fix: str) -> Finding:
    """Something will not work."""
    return Finding(about, "problem", found, fix)


@dataclass(frozen=True, slots=True)
class Model:
    """What the settings make of the target: the speculator line that all processes must agree on."""

    target: str
    """Fingerprint."""
    line: str


@dataclass(slots=True)
class Patient:
    """The settings that are looked at, with what earlier looks have found out for later ones."""

    settings: Settings
    model: Model | None = None
    """None until the target was read, and where it cannot be."""
    clocks: dict[str, float] = field(default_factory=dict)
    """Seconds by which the clock of another machine is ahead of this one's, by its name."""


Look = Callable[[Patient], Iterable[Finding]]
