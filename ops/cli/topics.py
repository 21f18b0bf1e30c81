"""``aurora topics``: create and configure the Kafka topics."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from ops.cli.terminal import AsJson, Config, DryRun, Set, echo_json, echo_note, load_settings, new_table, user_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.topics import TopicChange

app = typer.Typer(no_args_is_help=True, help="Create and configure the Kafka topics.")


@app.command()
def apply(config: Config = None, set_: Set = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Create missing topics and update changed properties; with --dry-run, the broker validates without a change."""
    with user_errors():
        settings = load_settings(config, set_)
        from pipeline import topics as kafka_topics

        changes = kafka_topics.compare(settings.kafka)
        if as_json:
            echo_json({"changes": [asdict(change) for change in changes]})
        elif changes:
            Console().print(build_table(changes))
        for note in dict.fromkeys(change.note for change in changes if change.note):
            echo_note(f"note: {note}")
        kafka_topics.apply(settings.kafka, changes, dry_run=dry_run)
        if not changes:
            echo_note("nothing to change")
        else:
            echo_note("the broker accepts this; nothing was changed" if dry_run else "done")


def build_table(changes: Sequence[TopicChange]) -> Table:
    """Return current and declared values: ``+`` new topic, ``~`` changed property, ``!`` impossible change."""
    table = new_table("", "topic", "property", "current", "declared")
    for change in changes:
        sign = "!" if change.rejected else "+" if change.found is None else "~"
        color = {"!": "red", "+": "green", "~": "yellow"}[sign]
        table.add_row(sign, change.topic, change.property, change.found or "", change.declared, style=color)
    return table
