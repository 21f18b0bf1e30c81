"""Move several aliases as one change that survives a crash and a concurrent mover.

MLflow sets one alias at a time, and the last writer wins silently. A promotion moves two or three aliases. So a move is
first written as an intent (table ``intents``), then made alias by alias, each read before and after, then closed. The
table is the lock: a row can only follow the rows that its writer has read, and while an intent is open every mover
finishes it before it writes another. Aliases are set to the values in the intent, so finishing it twice has the same
result as finishing it once.

The lock does not hold off a person who moves an alias in the registry's own UI. A move that finds an alias with neither
its old nor its new value is abandoned with a reason. A click between that check and the write is overwritten, which the
audit log shows.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

import structlog

from pipeline.delta import DeltaLog
from schemas.errors import UserError
from schemas.events import AliasChange, AliasIntent, AliasMoved
from schemas.telemetry import spans
from schemas.telemetry.spans import Span
from schemas.telemetry.trace_context import version_context
from trainer.release.audit import Ledger
from trainer.release.registry import SpeculatorRegistry, Version

log = structlog.get_logger()

IntentState = Literal["intended", "done", "abandoned"]
_CLOSE_ATTEMPTS = 8


class MoveError(UserError):
    """The move was not made; the message gives the reason."""


def new_intent(
    line: str,
    action: str,
    changes: Sequence[AliasChange],
    *,
    actor: str,
    why: str,
    figures: Mapping[str, float] | None = None,
) -> AliasIntent:
    """Return a new intent with the changes that change an alias."""
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


def plan_promotion(aliases: Mapping[str, str], version: str, *, watched: bool) -> list[AliasChange]:
    """Return the changes that make a version champion; ``previous`` moves first, so that a rollback stays possible.

    Args:
        aliases: Of the line.
        version: The new champion.
        watched: Whether promotions are watched. Then ``previous`` names the anchor, which only the end of a watch
            moves; else it names the champion before.
    """
    champion, previous = aliases.get("champion"), aliases.get("previous")
    changes = [AliasChange(alias="champion", from_version=champion, to_version=version)]
    if champion not in {None, version} and not (watched and previous is not None):
        changes.insert(0, AliasChange(alias="previous", from_version=previous, to_version=champion))
    if aliases.get("canary") == version:
        changes += plan_canary(aliases, None)
    return changes


def plan_canary(aliases: Mapping[str, str], version: str | None) -> list[AliasChange]:
    """Return the change that makes a version canary; None removes the alias."""
    return [AliasChange(alias="canary", from_version=aliases.get("canary"), to_version=version)]


def plan_anchor(aliases: Mapping[str, str]) -> list[AliasChange]:
    """Return the change that makes the champion the anchor, which ends a watch."""
    return [AliasChange(alias="previous", from_version=aliases.get("previous"), to_version=aliases["champion"])]


def find_rollback_target(
    aliases: Mapping[str, str], moves: Sequence[AliasMoved], versions: Iterable[Version]
) -> str | None:
    """Return the version to which a rollback returns, or None if there is none.

    It is the version that ``previous`` names. If that is the champion, which came through its watch, it is the last
    other one that ``previous`` named and that is not in quarantine.

    Args:
        aliases: Of the line.
        moves: Recorded moves of the line, oldest first.
        versions: Of the line.
    """
    champion, previous = aliases.get("champion"), aliases.get("previous")
    if previous not in {None, champion}:
        return previous
    excluded = {version.number for version in versions if version.quarantined} | {champion, None}
    named = (move.to_version for move in reversed(moves) if move.alias == "previous")
    return next((version for version in named if version not in excluded), None)


def plan_rollback(aliases: Mapping[str, str], version: str) -> list[AliasChange]:
    """Return the changes that make an earlier version champion and anchor again and end the canary analysis.

    ``previous`` moves first: nodes must not take the champion that is rolled back for an anchor.

    Args:
        aliases: Of the line.
        version: The earlier version (``find_rollback_target``).
    """
    return [
        AliasChange(alias="previous", from_version=aliases.get("previous"), to_version=version),
        AliasChange(alias="champion", from_version=aliases.get("champion"), to_version=version),
        *plan_canary(aliases, None),
    ]


def find_next_change(intent: AliasIntent, aliases: Mapping[str, str]) -> AliasChange | None:
    """Return the first change that is still to be made, or None if all are made.

    Raises:
        MoveError: an alias was moved by hand since the intent was written.
    """
    for change in intent.changes:
        version = aliases.get(change.alias)
        if version not in (change.from_version, change.to_version):
            raise MoveError(
                f"alias {change.alias} of line {intent.line} names version {version or 'none'}, but named "
                f"{change.from_version or 'none'} when its move to {change.to_version or 'none'} was decided: it was "
                f"moved by hand meanwhile; check `aurora versions history` and decide again"
            )
    return next((change for change in intent.changes if aliases.get(change.alias) != change.to_version), None)


class AliasMover:
    """Makes moves under the lock. Methods raise ``RegistryError`` and ``TableError`` if one does not answer."""

    def __init__(self, tables: DeltaLog, registry: SpeculatorRegistry) -> None:
        self._ledger = Ledger(tables, "intents")
        self._registry = registry

    def intents(self, line: str) -> list[tuple[AliasIntent, IntentState]]:
        """Return every intent of a line with its state, oldest first."""
        last_rows = {row["id"]: row for row in self._ledger.read() if row["line"] == line}
        return [(AliasIntent.model_validate_json(row["intent"]), row["state"]) for row in last_rows.values()]

    def find_open(self, line: str) -> AliasIntent | None:
        """Return the intent of a line that is not closed."""
        return next((intent for intent, state in reversed(self.intents(line)) if state == "intended"), None)

    def finish_open(self, line: str) -> AliasIntent | None:
        """Finish the open intent of a line, written by any process; return it, or None if there is none."""
        intent = self.find_open(line)
        if intent is not None:
            log.warning("open_move_resumed", line=line, action=intent.action, actor=intent.actor, id=intent.id)
            self._carry_out(intent)
        return intent

    def move(self, intent: AliasIntent) -> None:
        """Write the intent, make its changes, and close it.

        Raises:
            MoveError: another move came first, or an alias was moved by hand; the message names the remedy.
        """
        if not intent.changes:
            return
        if (unfinished := self.find_open(intent.line)) is not None:
            raise MoveError(
                f"line {intent.line} is being moved: {unfinished.why} (by {unfinished.actor}); wait, then look again"
            )
        find_next_change(intent, self._registry.aliases(intent.line))
        if not self._write(intent, "intended"):
            raise MoveError(f"line {intent.line}: another move came first; look again")
        if why := self._carry_out(intent):
            raise MoveError(why)

    def _carry_out(self, intent: AliasIntent) -> str | None:
        """Make the remaining changes and close the intent; return the reason if it is abandoned."""
        try:
            while change := find_next_change(intent, self._registry.aliases(intent.line)):
                self._make_change(intent.line, change)
        except MoveError as error:
            log.warning("move_abandoned", line=intent.line, action=intent.action, why=str(error))
            self._close(intent, "abandoned", str(error))
            return str(error)
        self._close(intent, "done")
        log.info("aliases_moved", line=intent.line, action=intent.action, actor=intent.actor, why=intent.why)
        for span in _spans_of(intent, time.time()):
            spans.record(span)
        return None

    def _make_change(self, line: str, change: AliasChange) -> None:
        if change.to_version is None:
            self._registry.delete_alias(line, change.alias)
        elif self._registry.version(line, change.to_version) is not None:
            self._registry.set_alias(line, change.alias, change.to_version)
        else:
            # Without this error the line could never be moved again: each mover would first try to finish this move.
            raise MoveError(f"line {line} has no version {change.to_version} (any more); promote another")

    def _close(self, intent: AliasIntent, state: IntentState, note: str | None = None) -> None:
        """Write the last row of an intent, unless a concurrent mover has closed it."""
        for _ in range(_CLOSE_ATTEMPTS):
            still_open = self.find_open(intent.line)
            if still_open is None or still_open.id != intent.id or self._write(intent, state, note):
                return
        raise MoveError(
            f"table intents: other processes keep writing; the move of line {intent.line} is made but not closed"
        )

    def _write(self, intent: AliasIntent, state: IntentState, note: str | None = None) -> bool:
        return self._ledger.append(
            {
                "time": datetime.now(UTC),
                "line": intent.line,
                "id": intent.id,
                "state": state,
                "action": intent.action,
                "intent": intent.model_dump_json(),
                "note": note,
            }
        )


def _spans_of(intent: AliasIntent, end: float) -> Iterator[Span]:
    """Yield a span in the trace of each version to which an alias moved."""
    for change in intent.changes:
        if change.to_version is not None:
            registered = version_context(intent.line, change.to_version)
            yield Span(
                name="move alias",
                event="alias_moved",
                context=registered.child(),
                start=intent.time.timestamp(),
                end=end,
                parent=registered.span_id,
                attributes={
                    "line": intent.line,
                    "version": change.to_version,
                    "alias": change.alias,
                    "from_version": change.from_version or "",
                    "action": intent.action,
                    "actor": intent.actor,
                    "why": intent.why,
                },
            )
