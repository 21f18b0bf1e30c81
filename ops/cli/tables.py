"""``aurora tables``: maintain the Delta tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from ops.cli.terminal import AsJson, Config, DryRun, Set, echo_json, echo_note, load_settings, new_table, user_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.maintenance import MaintenanceResult

app = typer.Typer(no_args_is_help=True, help="Maintain the Delta tables.")


@app.callback()
def tables() -> None:
    """Keep ``maintain`` a subcommand: Typer runs a single command without its name."""


@app.command()
def maintain(config: Config = None, set_: Set = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Compact small files, apply the retention, and vacuum unreferenced files, as stream workers do on a schedule."""
    with user_errors():
        settings = load_settings(config, set_)
        from pipeline.maintenance import Maintenance

        done = Maintenance(settings.tables).run(dry_run=dry_run)
        if as_json:
            echo_json({"tables": [asdict(result) for result in done]})
        else:
            Console().print(build_table(done))
        for result in done:
            if result.error:
                echo_note(f"{result.table}: {result.error}")
        if dry_run:
            echo_note("nothing was changed")
    if any(result.error for result in done):
        raise typer.Exit(1)


def build_table(done: Sequence[MaintenanceResult]) -> Table:
    """Return the number of files by action."""
    table = new_table(
        "table", "held by", right=("expired", "compacted", "written", "vacuumed", "readable after version")
    )
    for result in done:
        counts = (result.expired, result.compacted, result.written, result.vacuumed, result.oldest_readable)
        table.add_row(result.table, result.held_by or "", *map(str, counts))
    return table
