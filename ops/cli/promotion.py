"""``aurora versions promote`` and ``aurora versions rollback``: move aliases with the code of the promoter."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ops.cli.terminal import AsJson, Config, DryRun, Set, echo, echo_json, echo_note, load_settings, user_errors
from ops.cli.versions import LineOption, connect_registry, find_line, find_version
from schemas.errors import UserError
from schemas.settings import Settings

if TYPE_CHECKING:
    from schemas.events import AliasChange, AliasIntent
    from trainer.release.alias_moves import AliasMover
    from trainer.release.audit import AuditLog
    from trainer.release.registry import Line, SpeculatorRegistry, Version

Why = Annotated[str, typer.Option("--why", help="Reason, for the audit record.")]


@dataclass(frozen=True, slots=True)
class ManualMove:
    """Registry, audit and mover of a manual alias move."""

    settings: Settings
    registry: SpeculatorRegistry
    audit: AuditLog
    mover: AliasMover

    def find_line(self, named: str | None) -> Line:
        """Return the line if it has no unfinished move.

        Raises:
            UserError: the line had an unfinished move, which is now finished. The command stops here, because a
                repeated rollback would otherwise roll back twice.
        """
        line = find_line(self.settings, self.registry, named)
        if unfinished := self.mover.finish_open(line.name):
            self.record(line.name)
            raise UserError(
                f"line {line.name} had an unfinished move ({unfinished.action} by {unfinished.actor}: "
                f"{unfinished.why}), which is now finished; nothing else was done: check the aliases and try again"
            )
        return line

    def record(self, line: str) -> None:
        """Record the moves of a line in the audit log."""
        self.audit.record(find_line(self.settings, self.registry, line), self.mover.intents(line))

    def apply(self, wanted: AliasIntent, line: Line) -> None:
        """Move the aliases and record the move; without a broker, the promoter sends the events later."""
        from trainer.release.audit import BrokerError

        self.mover.move(wanted)
        self.record(line.name)
        try:
            self.audit.send_events()
        except BrokerError as error:
            echo_note(f"recorded; the promoter sends the event when the broker is back ({error})")


def promote(  # noqa: PLR0913, PLR0917 - one for each flag
    version: Annotated[str, typer.Argument(help="Number or alias.")],
    config: Config = None,
    set_: Set = None,
    line: LineOption = None,
    to: Annotated[Literal["champion", "canary"], typer.Option("--to", help="Alias to move.")] = "champion",
    force: Annotated[bool, typer.Option("--force", help="Promote despite the gate or a quarantine.")] = False,
    why: Why = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a version champion or canary; the gate must pass."""
    with user_errors(), _registry_failures():
        from trainer.release.alias_moves import new_intent, plan_canary, plan_promotion

        move = _new_manual_move(load_settings(config, set_))
        of = move.find_line(line)
        found = find_version(move.registry, of, version)
        if of.aliases.get(to) == found.number:
            raise UserError(f"version {found.number} is already {to}")
        objection = _objection(move.settings, of, found, to)
        if objection and not force:
            raise UserError(f"{objection}; --force promotes it anyway")
        reason = why or (f"manual, despite: {objection}" if objection else "manual")
        if to == "champion":
            watched = move.settings.canary.anchor_share > 0
            action, changes = "promote", plan_promotion(of.aliases, found.number, watched=watched)
        else:
            action, changes = "start_canary", plan_canary(of.aliases, found.number)
        wanted = new_intent(of.name, action, changes, actor=getpass.getuser(), why=reason)
        lifted = bool(found.quarantined)
        _print_changes(
            wanted.changes, of, as_json=as_json, extra=[f"quarantine of {found.number} is lifted"] if lifted else []
        )
        if dry_run:
            return
        if lifted:
            move.registry.lift_quarantine(of.name, found.number)
        move.apply(wanted, of)


def rollback(
    config: Config = None,
    set_: Set = None,
    line: LineOption = None,
    why: Why = "",
    force: Annotated[bool, typer.Option("--force", help="Roll back even to a quarantined version.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make the previous version champion again and quarantine the current champion."""
    with user_errors(), _registry_failures():
        from trainer.release.alias_moves import find_rollback_target, new_intent, plan_rollback

        move = _new_manual_move(load_settings(config, set_))
        of = move.find_line(line)
        champion = of.aliases.get("champion")
        target = find_rollback_target(of.aliases, move.audit.moves(of.name), move.registry.versions(of.name))
        if champion is None or target is None:
            raise UserError(f"line {of.name}: nothing to roll back to; champion is {champion or 'none'}, previous none")
        quarantined = find_version(move.registry, of, target).quarantined
        if quarantined and not force:
            raise UserError(f"version {target} is in quarantine: {quarantined}; promote another, or use --force")
        reason = why or "manual"
        changes = plan_rollback(of.aliases, target)
        wanted = new_intent(of.name, "rollback", changes, actor=getpass.getuser(), why=reason)
        _print_changes(wanted.changes, of, as_json=as_json, extra=[f"{champion} is quarantined: {reason}"])
        if dry_run:
            return
        move.registry.quarantine(of.name, champion, f"rolled back: {reason}")
        move.apply(wanted, of)


@contextmanager
def _registry_failures() -> Iterator[None]:
    """Report a registry that stops answering during a move; the next move finishes it."""
    from trainer.release.registry import RegistryError

    try:
        yield
    except RegistryError as error:
        raise UserError(f"{error}; the promoter or the next command finishes a started move") from error


def _new_manual_move(settings: Settings) -> ManualMove:
    from pipeline.delta import DeltaLog
    from trainer.release.alias_moves import AliasMover
    from trainer.release.audit import AuditLog, KafkaEvents

    registry, tables = connect_registry(settings), DeltaLog(settings.tables)
    audit = AuditLog(tables, registry, KafkaEvents(settings.kafka))
    return ManualMove(settings, registry, audit, AliasMover(tables, registry))


def _objection(settings: Settings, line: Line, version: Version, to: str) -> str | None:
    """Return why the version should not be promoted, or None."""
    from trainer.release.gate import judge_candidate

    if version.quarantined:
        return f"version {version.number} is in quarantine: {version.quarantined}"
    if to == "canary":
        return None
    verdict = judge_candidate(version.number, line.aliases.get("champion"), version.tags, settings.promoter)
    return None if verdict.promote else verdict.why


def _print_changes(changes: tuple[AliasChange, ...], line: Line, *, as_json: bool, extra: list[str]) -> None:
    """Print the planned changes."""
    if as_json:
        plain = {"line": line.name, "changes": [change.model_dump() for change in changes], "also": extra}
        echo_json(plain)
        return
    echo(f"line {line.name}")
    for change in changes:
        echo(f"  {change.alias}: {change.from_version or 'none'} -> {change.to_version or 'none'}")
    for more in extra:
        echo(f"  {more}")
