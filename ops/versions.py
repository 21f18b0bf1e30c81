"""The speculator versions of a line, as the registry and the table of promotions tell them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ops.record import Swap, Version
from schemas.settings import Settings


@dataclass(frozen=True, slots=True)
class Registered:
    """A version as the registry has it."""

    version: str
    time: float
    tags: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Promoted:
    """A move of the alias ``champion``."""

    version: str
    time: float


def read(settings: Settings, line: str) -> tuple[list[Registered], list[Promoted]]:
    """Versions and promotions of a line, oldest first. Raises what MLflow and ``TableError`` raise."""
    from pipeline.table import DeltaLog
    from schemas.registry import connect, model_name

    found = connect(settings.registry).search_model_versions(f"name = '{model_name(line)}'")
    registered = [Registered(str(v.version), v.creation_timestamp / 1000, dict(v.tags)) for v in found]
    moves = DeltaLog(settings.tables).read("promotions", ["time", "line", "alias", "to_version"]).to_pylist()
    promoted = [
        Promoted(move["to_version"], move["time"].timestamp())
        for move in moves
        if move["line"] == line and move["alias"] == "champion" and move["to_version"]
    ]
    return sorted(registered, key=lambda v: v.time), sorted(promoted, key=lambda p: p.time)


def since(
    start: float, registered: Sequence[Registered], promoted: Sequence[Promoted], swaps: Sequence[Swap]
) -> tuple[Version, ...]:
    """The versions registered after ``start``, with what became of each."""
    first_promoted = {p.version: p.time for p in reversed(promoted)}
    first_served = {s.version: s.time for s in reversed(swaps)}
    return tuple(
        Version(
            version=v.version,
            registered=v.time,
            promoted=first_promoted.get(v.version),
            served=first_served.get(v.version),
            **_held_back(v.tags),
        )
        for v in registered
        if v.time >= start
    )


def _held_back(tags: Mapping[str, str]) -> dict[str, float | None]:
    try:
        figures = json.loads(tags.get("held_back", "{}"))
    except ValueError:
        figures = {}
    return {
        "held_back": figures.get("accept_length"),
        "champion_held_back": figures.get("champion_accept_length"),
    }
