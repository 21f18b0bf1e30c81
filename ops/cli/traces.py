"""``aurora traces``: query the tables as statistics, as newest verify steps, or with SQL."""

from __future__ import annotations

import base64
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from decimal import Decimal
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from ops.cli.terminal import (
    AsJson,
    Config,
    Set,
    echo,
    echo_json,
    echo_note,
    load_settings,
    new_table,
    open_tables,
    parse_time,
    to_json,
    user_errors,
)
from schemas.errors import UserError

if TYPE_CHECKING:
    from pipeline.delta import Moment
    from pipeline.trace_queries import GroupStats, TraceStats

MAX_TABLE_ROWS = 100
POLL_S = 0.5

app = typer.Typer(no_args_is_help=True, help="Query the tables: statistics, newest verify steps, SQL.")


@app.command()
def stats(
    config: Config = None,
    set_: Set = None,
    since: Annotated[str | None, typer.Option("--since", help="Start: 90s, 30m, 2h, 7d ago, or a time.")] = None,
    by: Annotated[
        Literal["line", "speculator", "label", "node"] | None, typer.Option("--by", help="Group by this column.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count requests, tokens, verify steps and accepted draft tokens, missing chunks, and bytes per token."""
    with user_errors():
        settings = load_settings(config, set_)
        from pipeline import trace_queries

        counted = trace_queries.compute_stats(open_tables(settings), by, parse_time(since) if since else None)
        if as_json:
            echo_json(_stats_json(counted, by))
            return
        Console().print(_build_stats_table(counted, by))
        for line in _describe_rest(counted):
            echo(line)


@app.command()
def tail(
    config: Config = None,
    set_: Set = None,
    count: Annotated[int, typer.Option("-n", min=0, help="Number of newest verify steps.")] = 10,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for new verify steps until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the newest verify steps with their draft tokens and the accepted ones."""
    with user_errors():
        settings = load_settings(config, set_)
        from pipeline.trace_queries import follow_steps, read_newest_steps

        tables = open_tables(settings)
        rows, version = read_newest_steps(tables, count)
        for part in chain([rows], follow_steps(tables, version, POLL_S) if follow else []):
            for row in part.to_pylist():
                echo(to_json(row, _json_value) if as_json else _format_verify_step(row))
            sys.stdout.flush()


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="One statement. `aurora traces tables` lists tables and columns.")],
    config: Config = None,
    set_: Set = None,
    version: Annotated[int | None, typer.Option("--version", min=0, help="Version of the table.")] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="State of the tables at a time: 2h, 7d ago, or a time.")
    ] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV with lists as JSON.")] = False,
) -> None:
    """Run a SQL query on the tables (DataFusion dialect)."""
    with user_errors():
        settings = load_settings(config, set_)
        if as_json and as_csv:
            raise UserError("--json and --csv exclude each other")
        answer = open_tables(settings).query(query, _table_states(query, version, at))
        names = answer.schema.names
        rows = (row for batch in answer for row in batch.to_pylist())
        if as_json:
            _write_json(rows)
        elif as_csv:
            _write_csv(names, rows)
        else:
            _print_table(names, rows)


@app.command()
def tables(config: Config = None, set_: Set = None, as_json: AsJson = False) -> None:
    """List the tables with their versions, rows and columns."""
    with user_errors():
        settings = load_settings(config, set_)
        from schemas.batches import TABLES

        log = open_tables(settings)
        listed = [
            {
                "table": name,
                "version": log.version(name),
                "rows": log.row_count(name),
                "bytes": log.size(name),
                "columns": {field.name: str(field.type) for field in schema},
            }
            for name, schema in TABLES.items()
        ]
        if as_json:
            echo_json(listed)
            return
        shown = new_table("table", "columns", right=("version", "rows", "bytes"))
        for one in listed:
            figures = (f"{one[name]:,}" for name in ("version", "rows", "bytes"))
            shown.add_row(str(one["table"]), ", ".join(TABLES[str(one["table"])].names), *figures)
        Console().print(shown)


def _table_states(query: str, version: int | None, at: str | None) -> dict[str, Moment]:
    """Return the version or time of each table in the query.

    Raises:
        UserError: a version with several tables.
    """
    from pipeline.delta import tables_in

    named = tables_in(query)
    if at is not None:
        if version is not None:
            raise UserError("--version and --at exclude each other")
        return dict.fromkeys(named, parse_time(at))
    if version is None:
        return {}
    if len(named) != 1:
        raise UserError(
            f"--version needs a query on one table; this one names {', '.join(named) or 'none'}. "
            f"Use --at for the state of all tables at a time"
        )
    return {named[0]: version}


def _build_stats_table(counted: TraceStats, by: str | None) -> Table:
    depths = sorted(counted.total.drafted_to)
    figures = ("requests", "tokens", "verify steps", "drafted", "accepted", "by suffix", "acceptance length")
    shown = new_table(by or "group", right=(*figures, *(f"depth {depth}" for depth in depths)))
    for name, one in [*((name or "(none)", one) for name, one in counted.groups.items()), ("all", counted.total)]:
        length = "" if one.acceptance_length is None else f"{one.acceptance_length:.2f}"
        counts = (
            f"{number:,}"
            for number in (
                *(one.requests, one.tokens, one.verify_steps, one.draft_tokens, one.accepted_tokens),
                one.suffix_accepted_tokens,
            )
        )
        shown.add_row(name, *counts, length, *(f"{share:.2f}" for share in one.acceptance_by_depth))
    return shown


def _describe_rest(counted: TraceStats) -> Iterator[str]:
    """Yield the statistics that have no groups."""
    letters = ", ".join(f"{reason} {number:,}" for reason, number in counted.dead_letters.items())
    sizes = ", ".join(f"{name} {size:,}" for name, size in counted.table_bytes.items())
    yield f"requests without an end: {counted.chunks.unfinished:,}; missing chunks: {counted.chunks.missing:,}"
    yield f"dead letters: {letters or 'none'}"
    per_token = "" if counted.bytes_per_token is None else f"; {counted.bytes_per_token:,.0f} per token"
    yield f"table bytes: {sizes}{per_token}"


def _stats_json(counted: TraceStats, by: str | None) -> dict[str, Any]:
    return {
        **_figures_json(counted.total),
        **({f"by_{by}": {name: _figures_json(one) for name, one in counted.groups.items()}} if by else {}),
        "unfinished_requests": counted.chunks.unfinished,
        "missing_chunks": counted.chunks.missing,
        "dead_letters": dict(counted.dead_letters),
        "table_bytes": dict(counted.table_bytes),
        "table_bytes_per_token": counted.bytes_per_token,
    }


def _figures_json(one: GroupStats) -> dict[str, Any]:
    return {
        "requests": one.requests,
        "tokens": one.tokens,
        "verify_steps": one.verify_steps,
        "draft_tokens": one.draft_tokens,
        "accepted_tokens": one.accepted_tokens,
        "suffix_accepted_tokens": one.suffix_accepted_tokens,
        "acceptance_length": one.acceptance_length,
        "acceptance_by_depth": one.acceptance_by_depth,
    }


def _format_verify_step(row: Mapping[str, Any]) -> str:
    """Return one line: accepted draft tokens, rejected draft tokens, and the bonus token."""
    from schemas.trace.record import DraftSource

    drafted, accepted = row["draft_tokens"], set(row["accepted"])
    kept = " ".join(str(drafted[node]) for node in row["accepted"])
    lost = " ".join(str(token) for node, token in enumerate(drafted) if node not in accepted)
    draft = f"{len(accepted)} of {len(drafted)} accepted: {kept} | {lost}" if drafted else "no draft"
    sources = row["draft_sources"] or ()
    drafters = [row["speculator"], *(["suffix"] if any(source & DraftSource.SUFFIX for source in sources) else [])]
    by = f" by {'+'.join(filter(None, drafters))}" if drafted and any(drafters) else ""
    label = f" [{row['label']}]" if row["label"] else ""
    then = "" if row["bonus"] is None else f" -> {row['bonus']}"
    return f"{row['time']:%H:%M:%S.%f} {row['node']} {row['request']} #{row['verify_step']}{label}{by}  {draft}{then}"


def _write_json(rows: Iterator[dict[str, Any]]) -> None:
    """Write an array row by row: a result may exceed the memory."""
    ending = "[]\n"
    for number, row in enumerate(rows):
        sys.stdout.write(("[\n" if number == 0 else ",\n") + to_json(row, _json_value))
        ending = "\n]\n"
    sys.stdout.write(ending)


def _write_csv(names: Sequence[str], rows: Iterator[dict[str, Any]]) -> None:
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(names)
    for row in rows:
        out.writerow([_cell(value) for value in row.values()])


def _print_table(names: Sequence[str], rows: Iterator[dict[str, Any]]) -> None:
    shown = new_table(*names)
    for number, row in enumerate(rows):
        if number == MAX_TABLE_ROWS:
            echo_note(f"the first {MAX_TABLE_ROWS} rows; --json and --csv print all")
            break
        shown.add_row(*(str(_cell(value)) for value in row.values()))
    Console().print(shown)


def _cell(value: object) -> object:
    if isinstance(value, list | dict):
        return to_json(value, _json_value)
    return "" if value is None else _json_value(value)


def _json_value(value: object) -> object:
    """Convert a value for JSON: times to ISO format, bytes to base64, decimals to numbers."""
    match value:
        case bytes():
            return base64.b64encode(value).decode()
        case date():
            return value.isoformat()
        case Decimal():
            return int(value) if value == value.to_integral_value() else float(value)
        case int() | float() | str():
            return value
        case _:
            return str(value)
