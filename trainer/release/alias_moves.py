"""Moves of aliases that survive a crash and a second mover.

MLflow sets one alias at a time, and the last writer wins without a word. A promotion moves two or three. So a move is
first written down as an intent (table ``intents``), then made alias by alias, each read before and behind, then
closed. The table is the lock: a row can only follow the rows that its writer has read, and while an intent is open
nobody writes another, but finishes that one first, whoever began it. Aliases are set to what the intent says, so that
to finish it twice is to finish it once.

What this does not hold off is a person who moves an alias in the registry's own pages. A move that finds an alias
neither as it was nor as it has to be stops there, and says so; a person whose click falls between the look and the
write is overwritten, which the record shows.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from schemas.errors import UserError
from schemas.events import Alias, AliasChange, AliasIntent
from schemas.telemetry import spans
from schemas.telemetry.spans import Span
from schemas.telemetry.trace_context import of_version
from trainer.release.ledger import Ledger, Tables

log = structlog.get_logger()

_TRIES = 8


class MoveError(UserError):
    """The move was not made; the message says what came in between."""


class Registry(Protocol):
    """The part of the registry that moves need. Every method raises ``RegistryError``."""

    def aliases(self, line: str) -> Mapping[str, str]:
        """Version that each alias of a line names."""

    def has(self, line: str, version: str) -> bool:
        """Whether a line has a version."""

    def point(self, line: str, alias: Alias, version: str) -> None:
        """Make an alias name a version."""

    def unpoint(self, line: str, alias: Alias) -> None:
        """Take an alias away; one that is not there is no error."""


def intent(
    line: str,
    action: str,
    changes: Sequence[AliasChange],
    *,
    actor: str,
    why: str,
    figures: Mapping[str, float] | None = None,
) -> AliasIntent:
    """A new intent, with those of the changes that change something."""
    return AliasIntent.model_validate(
        {
            "id": uuid.uuid4().hex,
            "time": datetime.now(UTC),
            "line": line,
            "action": action,
            "changes": [change for change in changes if change.from_version != change.to_version],
            "actor": actor,
            "why": why,
            "figures": dict(figures or {}),
        }
    )


def promotion(aliases: Mapping[str, str], version: str) -> list[AliasChange]:
    """``champion`` to a version; ``previous`` first, so that there is a way back at every moment."""
    champion = aliases.get("champion")
    changes = [AliasChange(alias="champion", from_version=champion, to_version=version)]
    if champion is not None and champion != version:
        changes.insert(0, AliasChange(alias="previous", from_version=aliases.get("previous"), to_version=champion))
    if aliases.get("canary") == version:
        changes.append(AliasChange(alias="canary", from_version=version, to_version=None))
    return changes


def trial(aliases: Mapping[str, str], version: str | None) -> list[AliasChange]:
    """``canary`` to a version, or to none."""
    return [AliasChange(alias="canary", from_version=aliases.get("canary"), to_version=version)]


def rollback(aliases: Mapping[str, str], before: str | None) -> list[AliasChange]:
    """``champion`` to what ``previous`` names, and ``previous`` to the version before that; a trial ends.

    Args:
        aliases: With ``champion`` and ``previous``.
        before: Version to go back to from there; None where there is none.
    """
    champion, previous = aliases["champion"], aliases["previous"]
    return [
        AliasChange(alias="champion", from_version=champion, to_version=previous),
        AliasChange(alias="previous", from_version=previous, to_version=before),
        *trial(aliases, None),
    ]


def next_change(wanted: AliasIntent, aliases: Mapping[str, str]) -> AliasChange | None:
    """The first change that is still to be made; None when all are.

    Raises:
        MoveError: somebody else has moved one of the aliases since the intent was written.
    """
    for change in wanted.changes:
        named = aliases.get(change.alias)
        if named not in (change.from_version, change.to_version):
            raise MoveError(
                f"alias {change.alias} of line {wanted.line} names version {named or 'none'}, and was "
                f"{change.from_version or 'none'} when its move to {change.to_version or 'none'} was decided: somebody "
                f"has moved it by hand meanwhile; look at `aurora history`, and decide again"
            )
    return next((change for change in wanted.changes if aliases.get(change.alias) != change.to_version), None)


def spans_of(made: AliasIntent, now: float) -> Iterator[Span]:
    """What a move tells: a span in the trace of each version that an alias has come to name."""
    for change in made.changes:
        if change.to_version is not None:
            registered = of_version(made.line, change.to_version)
            yield Span(
                name="move",
                context=registered.child(),
                start=made.time.timestamp(),
                end=now,
                parent=registered.span,
                attributes={
                    "line": made.line,
                    "version": change.to_version,
                    "alias": change.alias,
                    "from": change.from_version or "",
                    "action": made.action,
                    "by": made.actor,
                    "why": made.why,
                },
            )


class Mover:
    """Makes the moves. Every method raises ``RegistryError`` and ``TableError`` where one does not answer."""

    def __init__(self, tables: Tables, registry: Registry) -> None:
        self._ledger = Ledger(tables, "intents")
        self._registry = registry

    def intents(self, line: str) -> list[tuple[AliasIntent, str]]:
        """Every intent of a line with its state (intended, done, abandoned), oldest first."""
        found = {row["id"]: row for row in self._ledger.read() if row["line"] == line}
        return [(AliasIntent.model_validate_json(row["intent"]), row["state"]) for row in found.values()]

    def notes(self, line: str) -> list[str]:
        """Why intents of a line were abandoned, oldest first."""
        return [row["note"] for row in self._ledger.read() if row["line"] == line and row["note"]]

    def open(self, line: str) -> AliasIntent | None:
        """The intent of a line that is not closed."""
        return next((one for one, state in reversed(self.intents(line)) if state == "intended"), None)

    def finish(self, line: str) -> AliasIntent | None:
        """Finish the open intent of a line, if there is one, whoever began it."""
        unfinished = self.open(line)
        if unfinished is not None:
            log.warning("finishing_move", line=line, action=unfinished.action, by=unfinished.actor, id=unfinished.id)
            self._carry_out(unfinished)
        return unfinished

    def move(self, wanted: AliasIntent) -> None:
        """Write the intent down, make its changes, and close it.

        Raises:
            MoveError: another move came first, or an alias was moved by hand; what to do is in the message.
        """
        if not wanted.changes:
            return
        if (unfinished := self.open(wanted.line)) is not None:
            raise MoveError(
                f"line {wanted.line} is being moved: {unfinished.why} (by {unfinished.actor}); wait, and look again"
            )
        next_change(wanted, self._registry.aliases(wanted.line))
        if not self._write(wanted, "intended"):
            raise MoveError(f"line {wanted.line}: another move came first; look again")
        if why := self._carry_out(wanted):
            raise MoveError(why)

    def _carry_out(self, wanted: AliasIntent) -> str | None:
        """Make what is left of the changes; gives why the intent was abandoned, if it was."""
        try:
            while change := next_change(wanted, self._registry.aliases(wanted.line)):
                self._make(wanted, change)
        except MoveError as error:
            log.warning("move_abandoned", line=wanted.line, action=wanted.action, why=str(error))
            self._close(wanted, "abandoned", str(error))
            return str(error)
        self._close(wanted, "done")
        log.info("moved", line=wanted.line, action=wanted.action, by=wanted.actor, why=wanted.why)
        for span in spans_of(wanted, time.time()):
            spans.record(span)
        return None

    def _make(self, wanted: AliasIntent, change: AliasChange) -> None:
        if change.to_version is None:
            self._registry.unpoint(wanted.line, change.alias)
        elif self._registry.has(wanted.line, change.to_version):
            self._registry.point(wanted.line, change.alias, change.to_version)
        else:
            # Otherwise the line could never be moved again: each mover would first try to finish this move.
            raise MoveError(f"line {wanted.line} has no version {change.to_version} (any more); promote another")

    def _close(self, wanted: AliasIntent, state: str, note: str | None = None) -> None:
        """Write the last row of an intent, unless another mover that finished it has."""
        for _ in range(_TRIES):
            still_open = self.open(wanted.line)
            if still_open is None or still_open.id != wanted.id or self._write(wanted, state, note):
                return
        raise MoveError(f"table intents: others write all the time; the move of line {wanted.line} is made, not closed")

    def _write(self, wanted: AliasIntent, state: str, note: str | None = None) -> bool:
        row: dict[str, Any] = {
            "time": datetime.now(UTC),
            "line": wanted.line,
            "id": wanted.id,
            "state": state,
            "action": wanted.action,
            "intent": wanted.model_dump_json(),
            "note": note,
        }
        return self._ledger.add(row)
