"""Brings the record of a line's aliases up to date: rows, events, and the stamp that nodes look at.

Whoever has moved an alias calls it, and the promoter calls it in every pass, so that moves by hand are recorded too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from pydantic import ValidationError

from schemas.events import AliasChange, AliasMoved, AuditState
from trainer.release.alias_moves import Mover, rollback
from trainer.release.audit import Audit, Move
from trainer.release.gate import HeldOut
from trainer.release.registry import Line, Version

BY_HAND = "unknown"
"""Who moved an alias, where nothing says so."""


class Registry(Protocol):
    """The part of the registry that is needed here. Every method raises ``RegistryError``."""

    def tags(self, line: str, version: str) -> Mapping[str, str]:
        """Tags of a version."""

    def versions(self, line: str) -> Sequence[Version]:
        """All versions of a line."""

    def stamp(self, line: str, audited: AuditState) -> None:
        """Write what the record says of a line's aliases where nodes see it."""


def record(audit: Audit, mover: Mover, registry: Registry, line: Line) -> list[AliasMoved]:
    """Write what is missing, and give it. Raises ``TableError`` and ``RegistryError``."""
    written = list(_rows(audit, mover, registry, line))
    audited = audit.audited(line.name)
    if audited is not None and (line.audited is None or line.audited.moves < audited.moves):
        registry.stamp(line.name, audited)
    return written


def _rows(audit: Audit, mover: Mover, registry: Registry, line: Line) -> Iterator[AliasMoved]:
    for move in audit.missing(line.name, line.aliases):
        moved = explained(move, audit.last(line.name, move.alias), mover, registry)
        if not audit.record(moved):
            return  # another process records the same line, and this one looks again in its next pass
        yield moved


def explained(move: Move, last: AliasMoved | None, mover: Mover, registry: Registry) -> AliasMoved:
    """Who made a move and why: the intent that asked for it, or what else tells.

    Args:
        move: It has no row.
        last: The recorded move of the same alias before it: intents from before that are spent.
        mover: Knows the intents.
        registry: Knows the versions.
    """
    change = AliasChange(alias=move.alias, from_version=move.from_version, to_version=move.to_version)
    for wanted, _ in reversed(mover.intents(move.line)):
        if change in wanted.changes and (last is None or wanted.time >= last.time):
            return move.explained(wanted.actor, f"{wanted.action}: {wanted.why}", wanted.figures)
    if move.alias == "candidate" and move.to_version is not None:
        with suppress(ValidationError):
            figures = HeldOut.of(registry.tags(move.line, move.to_version)).figures
            return move.explained("trainer", "registered with better held-out figures than the version before", figures)
    return move.explained(BY_HAND, "moved or removed by hand in the registry", {})


def rollback_of(audit: Audit, registry: Registry, line: Line) -> list[AliasChange]:
    """The changes of a rollback: ``previous`` becomes the last champion before it that is not in quarantine.

    Raises ``TableError`` and ``RegistryError``.

    Args:
        audit: Knows the champions of the past.
        registry: Knows which versions are in quarantine.
        line: With ``champion`` and ``previous``.
    """
    quarantined = {version.number for version in registry.versions(line.name) if version.quarantined}
    not_these = {*quarantined, line.aliases["champion"]}
    return rollback(line.aliases, version_before(audit.moves(line.name), line.aliases["previous"], not_these))


def version_before(moves: Sequence[AliasMoved], version: str, not_these: Collection[str]) -> str | None:
    """The version that was champion before another one was, for the step after a rollback to that one.

    Args:
        moves: Recorded moves of the line, oldest first.
        version: The champion after the rollback.
        not_these: Versions that nobody should go back to.
    """
    champions = [move.to_version for move in moves if move.alias == "champion" and move.to_version]
    if version not in champions:
        return None
    last = len(champions) - 1 - champions[::-1].index(version)
    earlier = [one for one in champions[:last] if one != version and one not in not_these]
    return earlier[-1] if earlier else None
