"""``aurora promote`` and ``aurora rollback``: a person's moves of aliases, by the same way as the promoter's."""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ops.cli.terminal import AsJson, Config, Set, hint, say, settings_of, told
from ops.cli.versions import OfLine
from ops.observe.lines import connect, line_of, version_of
from schemas.errors import UserError
from schemas.settings import Settings

if TYPE_CHECKING:
    from schemas.events import AliasChange, AliasIntent
    from trainer.release.alias_moves import AliasMover
    from trainer.release.audit import AuditLog
    from trainer.release.registry import Line, SpeculatorRegistry, Version

Why = Annotated[str, typer.Option("--why", help="Reason, for the record.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen, and change nothing.")]


@dataclass(frozen=True, slots=True)
class Hand:
    """What a person's move goes through."""

    settings: Settings
    registry: SpeculatorRegistry
    audit: AuditLog
    mover: AliasMover

    def line(self, named: str | None) -> Line:
        """The line, with no move of it begun and not finished.

        Raises:
            UserError: there was one; it is finished now. A rollback that died and is said again must not go back twice.
        """
        line = line_of(self.settings, self.registry, named)
        if unfinished := self.mover.finish_open(line.name):
            self.record(line.name)
            raise UserError(
                f"line {line.name} was in the middle of a move ({unfinished.action} by {unfinished.actor}: "
                f"{unfinished.why}); that one is finished now, and nothing else was done: look again, then decide"
            )
        return line

    def record(self, line: str) -> None:
        """Record the moves of a line."""
        self.audit.record(line_of(self.settings, self.registry, line), self.mover.intents(line))

    def make(self, wanted: AliasIntent, line: Line) -> None:
        """Make the move and record it; its events stay for the promoter where the broker is away."""
        from trainer.release.audit import BrokerError

        self.mover.move(wanted)
        self.record(line.name)
        try:
            self.audit.send_events()
        except BrokerError as error:
            hint(f"recorded; its event is sent by the promoter when the broker is back ({error})")


def promote(  # noqa: PLR0913, PLR0917 - one for each flag
    version: Annotated[str, typer.Argument(help="A number or an alias.")],
    config: Config = None,
    set_: Set = None,
    line: OfLine = None,
    to: Annotated[Literal["champion", "canary"], typer.Option("--to", help="What it becomes.")] = "champion",
    force: Annotated[bool, typer.Option("--force", help="Although the gate or a quarantine says no.")] = False,
    why: Why = "",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a version champion, which all nodes serve, or canary, which they try; refused where the gate says no."""
    with told(), _failures():
        from trainer.release.alias_moves import new_intent, plan_canary, plan_promotion

        hand = _hand(settings_of(config, set_))
        of = hand.line(line)
        found = version_of(hand.registry, of, version)
        if of.aliases.get(to) == found.number:
            raise UserError(f"version {found.number} is {to} already")
        objection = _objection(hand.settings, of, found, to)
        if objection and not force:
            raise UserError(f"{objection}; --force promotes it all the same")
        plan = plan_promotion if to == "champion" else plan_canary
        reason = why or (f"by hand, although {objection}" if objection else "by hand")
        action = "promote" if to == "champion" else "start_canary"
        changes = plan(of.aliases, found.number)
        wanted = new_intent(of.name, action, changes, actor=getpass.getuser(), why=reason)
        lifted = bool(found.quarantined)
        _tell(wanted.changes, of, as_json=as_json, extra=[f"quarantine of {found.number} is lifted"] if lifted else [])
        if dry_run:
            return
        if lifted:
            hand.registry.lift_quarantine(of.name, found.number)
        hand.make(wanted, of)


def rollback(
    config: Config = None,
    set_: Set = None,
    line: OfLine = None,
    why: Why = "",
    force: Annotated[bool, typer.Option("--force", help="Although the version before is in quarantine.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make the version before champion again, and put the one that is into quarantine."""
    with told(), _failures():
        from trainer.release.alias_moves import new_intent, plan_rollback

        hand = _hand(settings_of(config, set_))
        of = hand.line(line)
        champion, previous = of.aliases.get("champion"), of.aliases.get("previous")
        if champion is None or previous is None:
            raise UserError(f"line {of.name}: nothing to go back to; champion is {champion or 'none'}, previous none")
        held = version_of(hand.registry, of, previous).quarantined
        if held and not force:
            raise UserError(f"version {previous} is in quarantine: {held}; promote another, or use --force")
        reason = why or "by hand"
        changes = plan_rollback(of.aliases, hand.audit.moves(of.name), hand.registry.versions(of.name))
        wanted = new_intent(of.name, "rollback", changes, actor=getpass.getuser(), why=reason)
        _tell(wanted.changes, of, as_json=as_json, extra=[f"{champion} is put into quarantine: {reason}"])
        if dry_run:
            return
        hand.registry.quarantine(of.name, champion, f"rolled back: {reason}")
        hand.make(wanted, of)


@contextmanager
def _failures() -> Iterator[None]:
    """A registry that stops answering in the middle; what was begun is finished by whoever moves next."""
    from trainer.release.registry import RegistryError

    try:
        yield
    except RegistryError as error:
        raise UserError(f"{error}; if a move was begun, the promoter or the next command finishes it") from error


def _hand(settings: Settings) -> Hand:
    from pipeline.delta import DeltaLog
    from trainer.release.alias_moves import AliasMover
    from trainer.release.audit import AuditLog, KafkaEvents

    registry, tables = connect(settings), DeltaLog(settings.tables)
    return Hand(
        settings, registry, AuditLog(tables, registry, KafkaEvents(settings.kafka)), AliasMover(tables, registry)
    )


def _objection(settings: Settings, line: Line, version: Version, to: str) -> str | None:
    """Why the version should not be promoted, if anything speaks against it."""
    from trainer.release.gate import judge_candidate

    if version.quarantined:
        return f"version {version.number} is in quarantine: {version.quarantined}"
    if to == "canary":
        return None
    verdict = judge_candidate(version.number, line.aliases.get("champion"), version.tags, settings.promoter)
    return None if verdict.promote else verdict.why


def _tell(changes: tuple[AliasChange, ...], line: Line, *, as_json: bool, extra: list[str]) -> None:
    """Say what will happen."""
    if as_json:
        plain = {"line": line.name, "changes": [change.model_dump() for change in changes], "also": extra}
        sys.stdout.write(json.dumps(plain, indent=2) + "\n")
        return
    say(f"line {line.name}")
    for change in changes:
        say(f"  {change.alias}: {change.from_version or 'none'} -> {change.to_version or 'none'}")
    for more in extra:
        say(f"  {more}")
