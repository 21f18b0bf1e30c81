"""Promotions and rollbacks that a person decides, for the commands and the web page: with the code of the promoter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pipeline.delta import DeltaLog
from schemas.errors import UserError
from schemas.events import AliasIntent
from schemas.settings import Settings
from trainer.release.alias_moves import (
    AliasMover,
    MoveError,
    find_rollback_target,
    new_intent,
    plan_canary,
    plan_promotion,
    plan_rollback,
)
from trainer.release.audit import AuditLog, BrokerError, KafkaEvents
from trainer.release.gate import judge_candidate
from trainer.release.registry import Line, RegistryError, SpeculatorRegistry, Version

Destination = Literal["champion", "canary"]


@dataclass(frozen=True, slots=True)
class ManualMove:
    """A move that was checked and not made yet."""

    intent: AliasIntent
    lifted: str | None = None
    """Version whose quarantine the move lifts."""
    quarantined: str | None = None
    """Version that the move puts into quarantine."""

    @property
    def notes(self) -> list[str]:
        """What the move does beside moving aliases."""
        lifted = [f"quarantine of {self.lifted} is lifted"] if self.lifted else []
        return lifted + ([f"{self.quarantined} is quarantined: {self.intent.why}"] if self.quarantined else [])


class ManualMoves:
    """Plans and makes moves of one registry.

    Every method raises ``MoveError`` if the move must not be made, and ``RegistryError`` or ``TableError`` if the
    registry or the tables do not answer; ``registry_failures`` explains the first of these.

    Args:
        settings: All settings.
        registry: Of the versions.
        override: What a person gives to set ``force``, for messages.
    """

    def __init__(self, settings: Settings, registry: SpeculatorRegistry, override: str = "--force") -> None:
        tables = DeltaLog(settings.tables)
        self._settings = settings
        self._registry = registry
        self._override = override
        self._audit = AuditLog(tables, registry, KafkaEvents(settings.kafka))
        self._mover = AliasMover(tables, registry)

    def finish_open(self, line: Line) -> None:
        """Finish a move of the line that another process left unfinished.

        Raises:
            MoveError: there was one. Nothing else is done, because a repeated rollback would roll back twice.
        """
        if unfinished := self._mover.finish_open(line.name):
            self._record(line.name)
            raise MoveError(
                f"line {line.name} had an unfinished move ({unfinished.action} by {unfinished.actor}: "
                f"{unfinished.why}), which is now finished; nothing else was done: check the aliases and try again"
            )

    def plan_promotion(
        self, line: Line, version: Version, to: Destination, *, force: bool, why: str, actor: str
    ) -> ManualMove:
        """Return the move of an alias to a version; without ``force``, the gate must pass.

        Args:
            line: Of the version.
            version: The version.
            to: The alias.
            force: Move it despite the gate or a quarantine.
            why: Reason, for the audit record; empty for a default.
            actor: Who moves it.
        """
        if line.aliases.get(to) == version.number:
            raise MoveError(f"version {version.number} is already {to}")
        objection = self._object(line, version, to)
        if objection and not force:
            raise MoveError(f"{objection}; {self._override} promotes it anyway")
        reason = why or (f"manual, despite: {objection}" if objection else "manual")
        if to == "champion":
            watched = self._settings.canary.anchor_share > 0
            action, changes = "promote", plan_promotion(line.aliases, version.number, watched=watched)
        else:
            action, changes = "start_canary", plan_canary(line.aliases, version.number)
        return ManualMove(
            new_intent(line.name, action, changes, actor=actor, why=reason),
            lifted=version.number if version.quarantined else None,
        )

    def plan_rollback(self, line: Line, *, force: bool, why: str, actor: str) -> ManualMove:
        """Return the move of ``champion`` back to the anchor; without ``force``, to none in quarantine."""
        champion, versions = line.aliases.get("champion"), self._registry.versions(line.name)
        target = find_rollback_target(line.aliases, self._audit.moves(line.name), versions)
        if champion is None or target is None:
            raise MoveError(
                f"line {line.name}: nothing to roll back to; champion is {champion or 'none'}, previous none"
            )
        quarantined = next((version.quarantined for version in versions if version.number == target), None)
        if quarantined and not force:
            raise MoveError(
                f"version {target} is in quarantine: {quarantined}; promote another, or use {self._override}"
            )
        changes = plan_rollback(line.aliases, target)
        return ManualMove(
            new_intent(line.name, "rollback", changes, actor=actor, why=why or "manual"), quarantined=champion
        )

    def make(self, move: ManualMove) -> str | None:
        """Make a move and record it.

        Returns:
            Why the promoter sends the event later; None if it is sent.
        """
        line = move.intent.line
        # Before the aliases move: no promoter may promote the version again in between.
        if move.quarantined:
            self._registry.quarantine(line, move.quarantined, f"rolled back: {move.intent.why}")
        if move.lifted:
            self._registry.lift_quarantine(line, move.lifted)
        self._mover.move(move.intent)
        self._record(line)
        try:
            self._audit.send_events()
        except BrokerError as error:
            return f"recorded; the promoter sends the event when the broker is back ({error})"
        return None

    def _object(self, line: Line, version: Version, to: Destination) -> str | None:
        """Return why the version should not be promoted, or None."""
        if version.quarantined:
            return f"version {version.number} is in quarantine: {version.quarantined}"
        if to == "canary":
            return None
        champion = line.aliases.get("champion")
        verdict = judge_candidate(version.number, champion, version.tags, self._settings.promoter)
        return None if verdict.promote else verdict.why

    def _record(self, name: str) -> None:
        line = next(line for line in self._registry.lines() if line.name == name)
        self._audit.record(line, self._mover.intents(name))


@contextmanager
def registry_failures() -> Iterator[None]:
    """Report a registry that stops answering during a move; the next move finishes it."""
    try:
        yield
    except RegistryError as error:
        raise UserError(f"{error}; the promoter or the next command finishes a started move") from error
