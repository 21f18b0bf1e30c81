"""The speculator versions of a line, as the registry and the table of promotions tell them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ops.demo.record import Swap, Version
from schemas.settings import Settings

if TYPE_CHECKING:
    from schemas.events import AliasMoved
    from trainer.release import registry


def read(settings: Settings, line: str) -> tuple[list[registry.Version], list[AliasMoved]]:
    """Versions of a line, and the moves of ``champion`` to one; oldest first.

    Raises:
        RegistryError: no answer.
        TableError: the table cannot be read.
    """
    from pipeline.delta import DeltaLog
    from trainer.release.audit import read_moves
    from trainer.release.registry import SpeculatorRegistry

    moves = read_moves(DeltaLog(settings.tables))
    promoted = [move for move in moves if move.line == line and move.alias == "champion" and move.to_version]
    return SpeculatorRegistry(settings.registry).versions(line), promoted


def since(
    start: float, registered: Sequence[registry.Version], promoted: Sequence[AliasMoved], swaps: Sequence[Swap]
) -> tuple[Version, ...]:
    """The versions registered after ``start``, with what became of each."""
    first_promoted = {move.to_version: move.time.timestamp() for move in reversed(promoted)}
    first_served = {s.version: s.time for s in reversed(swaps)}
    return tuple(
        Version(
            version=v.number,
            registered=v.registered.timestamp(),
            promoted=first_promoted.get(v.number),
            served=first_served.get(v.number),
            **_held_out(v.tags),
        )
        for v in registered
        if v.registered.timestamp() >= start
    )


def _held_out(tags: Mapping[str, str]) -> dict[str, float | None]:
    try:
        figures = json.loads(tags.get("held_out", "{}"))
    except ValueError:
        figures = {}
    return {
        "held_out": figures.get("accepted_per_step"),
        "champion_held_out": figures.get("champion_accepted_per_step"),
    }
