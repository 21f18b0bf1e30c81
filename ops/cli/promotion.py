"""``aurora versions promote`` and ``aurora versions rollback``: move aliases with the code of the promoter."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ops.cli.terminal import AsJson, Config, DryRun, Set, echo, echo_json, echo_note, load_settings, user_errors
from ops.cli.versions import LineOption, connect_registry, find_line, find_version

if TYPE_CHECKING:
    from trainer.release.manual_moves import ManualMove

Why = Annotated[str, typer.Option("--why", help="Reason, for the audit record.")]


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
    with user_errors():
        from trainer.release.manual_moves import ManualMoves, registry_failures

        with registry_failures():
            settings = load_settings(config, set_)
            registry = connect_registry(settings)
            moves, of = ManualMoves(settings, registry), find_line(settings, registry, line)
            moves.finish_open(of)
            found = find_version(registry, of, version)
            move = moves.plan_promotion(of, found, to, force=force, why=why, actor=getpass.getuser())
            _print_move(move, as_json=as_json)
            if not dry_run and (note := moves.make(move)):
                echo_note(note)


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
    with user_errors():
        from trainer.release.manual_moves import ManualMoves, registry_failures

        with registry_failures():
            settings = load_settings(config, set_)
            registry = connect_registry(settings)
            moves, of = ManualMoves(settings, registry), find_line(settings, registry, line)
            moves.finish_open(of)
            move = moves.plan_rollback(of, force=force, why=why, actor=getpass.getuser())
            _print_move(move, as_json=as_json)
            if not dry_run and (note := moves.make(move)):
                echo_note(note)


def _print_move(move: ManualMove, *, as_json: bool) -> None:
    """Print the planned changes."""
    intent = move.intent
    if as_json:
        changes = [change.model_dump() for change in intent.changes]
        echo_json({"line": intent.line, "changes": changes, "also": move.notes})
        return
    echo(f"line {intent.line}")
    for change in intent.changes:
        echo(f"  {change.alias}: {change.from_version or 'none'} -> {change.to_version or 'none'}")
    for note in move.notes:
        echo(f"  {note}")
