"""``aurora tables``: looking after the Delta tables."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ops.cli.terminal import AsJson, Config, Set, hint, settings_of, told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.maintenance import MaintenanceResult

app = typer.Typer(no_args_is_help=True, help="The Delta tables.")

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]


@app.callback()
def tables() -> None:
    """Keep ``maintain`` a command of its own."""


@app.command()
def maintain(config: Config = None, set_: Set = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Merge small files, let old days go, and delete files nobody needs; the stream does it by itself as well."""
    with told():
        settings = settings_of(config, set_)
        from pipeline.maintenance import Maintenance

        done = Maintenance(settings.tables).run(dry_run=dry_run)
        if as_json:
            sys.stdout.write(json.dumps({"tables": [asdict(of_one) for of_one in done]}, indent=2) + "\n")
        else:
            Console().print(as_table(done))
        for of_one in done:
            if of_one.error:
                hint(f"{of_one.table}: {of_one.error}")
        if dry_run:
            hint("nothing was changed")
    if any(of_one.error for of_one in done):
        raise typer.Exit(1)


def as_table(done: Sequence[MaintenanceResult]) -> Table:
    """Files by what became of them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("table")
    for column in ("expired", "compacted", "written", "vacuumed", "readable after version"):
        table.add_column(column, justify="right")
    table.add_column("held by", overflow="fold")
    for of_one in done:
        counts = (of_one.expired, of_one.compacted, of_one.written, of_one.vacuumed, of_one.oldest_readable)
        table.add_row(of_one.table, *map(str, counts), of_one.held_by or "")
    return table
