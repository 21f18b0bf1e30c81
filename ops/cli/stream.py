"""``aurora stream``: run a stream worker, skip an offset that none can pass, and begin a new log of the topic."""

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
        from pipeline.topic_logs import read_newest

        tables = open_tables(settings)
        address = parse_address(id_, read_newest(tables, settings.kafka.traces_topic).name)
        source = SourcePartition(address.topic, address.partition)
        committer = OffsetCommitter(tables)
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


@app.command(name="new-log")
def new_log(
    why: Annotated[str, typer.Option("--why", help="Why; the table dead_letters keeps it.")],
    config: Config = None,
    set_: Set = None,
) -> None:
    """Let the workers read the topic from its start, under another name in the tables. Stop them first.

    For a log that was cut and has grown again, which a worker reports and does not read. What is left of the old
    records is then in the tables twice, under either name.
    """
    with user_errors():
        settings = load_settings(config, set_)
        from pipeline.broker import BrokerError, Watermarks
        from pipeline.topic_logs import begin

        try:
            begun = begin(
                settings.kafka.traces_topic,
                open_tables(settings),
                Watermarks(settings.kafka),
                time.time_ns() // 1000,
                f"a new log was declared by {getpass.getuser()}: {why}",
            )
        except BrokerError as error:
            raise UserError(str(error)) from error
        echo(f"workers will read topic {begun.topic} from its start; its name in the tables is {begun.name}")
