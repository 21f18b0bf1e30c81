"""``aurora stream``: run a stream worker, and skip an offset that none can pass."""

from __future__ import annotations

import getpass
import time
from typing import Annotated

import typer

from ops.cli.terminal import Config, Set, echo, load_settings, open_tables, user_errors
from schemas.errors import UserError

app = typer.Typer(invoke_without_command=True)


@app.callback()
def stream(context: typer.Context, config: Config = None, set_: Set = None) -> None:
    """Run a stream worker."""
    if context.invoked_subcommand is not None:
        return
    with user_errors():
        settings = load_settings(config, set_)
        from pipeline.worker import run

        run(settings)


@app.command()
def skip(
    id_: Annotated[str, typer.Argument(metavar="OFFSET", help="TOPIC/PARTITION/OFFSET, or PARTITION/OFFSET.")],
    why: Annotated[str, typer.Option("--why", help="Why; the table dead_letters keeps it.")],
    config: Config = None,
    set_: Set = None,
) -> None:
    """Move the tables past the record at the next offset of a partition, without it: a last resort.

    The table dead_letters records it with the reason `skipped`. A running worker continues behind it.
    """
    with user_errors():
        settings = load_settings(config, set_)
        from pipeline.dead_letters.queue import parse_address
        from pipeline.offsets import SKIPPED, FencedError, OffsetCommitter, SourcePartition

        address = parse_address(id_, settings.kafka.traces_topic)
        source = SourcePartition(address.topic, address.partition)
        committer = OffsetCommitter(open_tables(settings))
        if (next_offset := committer.next_offset(source)) != address.offset:
            raise UserError(
                f"{address}: the next offset of this partition is {next_offset}, and only the record there can be "
                f"skipped; `aurora status --json` has the next offsets"
            )
        offsets = range(next_offset, next_offset + 1)
        try:
            committer.record_loss(
                source, offsets, time.time_ns() // 1000, SKIPPED, f"skipped by {getpass.getuser()}: {why}"
            )
        except FencedError as error:
            raise UserError(f"{address}: a worker has moved on meanwhile; nothing was skipped ({error})") from error
        echo(f"skipped {address}; the next offset is {committer.next_offset(source)}")
