"""``aurora topics``: the Kafka topics, brought in line with the settings."""

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

    from pipeline.topics import TopicChange

app = typer.Typer(no_args_is_help=True, help="The Kafka topics, as the settings want them.")

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would change, and let the broker check it.")]


@app.command()
def apply(config: Config = None, set_: Set = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Create what is missing, change what is declared otherwise, and leave all else; a second run changes nothing."""
    with told():
        settings = settings_of(config, set_)
        from pipeline import topics as kafka_topics

        changes = kafka_topics.compare(settings.kafka)
        if as_json:
            sys.stdout.write(json.dumps({"changes": [asdict(change) for change in changes]}, indent=2) + "\n")
        elif changes:
            Console().print(as_table(changes))
        for note in dict.fromkeys(change.note for change in changes if change.note):
            hint(f"note: {note}")
        kafka_topics.apply(settings.kafka, changes, dry_run=dry_run)
        if not changes:
            hint("nothing to change")
        else:
            hint("the broker would take this; nothing was changed" if dry_run else "done")


def as_table(changes: Sequence[TopicChange]) -> Table:
    """What is, and what will be; ``+`` for a topic that is missing, ``~`` for a change, ``!`` for what cannot be."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "topic", "property", "is", "will be"):
        table.add_column(column, overflow="fold")
    for change in changes:
        sign = "!" if change.rejected else "+" if change.found is None else "~"
        colour = {"!": "red", "+": "green", "~": "yellow"}[sign]
        table.add_row(sign, change.topic, change.property, change.found or "", change.declared, style=colour)
    return table
