"""``aurora traces``: a look into the tables, as figures, as the newest verify steps, or by SQL."""

from __future__ import annotations

import base64
import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from decimal import Decimal
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from ops.cli.terminal import AsJson, Config, Set, hint, moment, opened, say, settings_of, told
from ops.observe.panels import grid
from schemas.errors import UserError

if TYPE_CHECKING:
    from pipeline.delta import Moment
    from pipeline.trace_queries import GroupStats, TraceStats

SHOWN_ROWS = 100
POLL_S = 0.5

app = typer.Typer(no_args_is_help=True, help="A look into the tables: figures, newest verify steps, SQL.")


@app.command()
def stats(
    config: Config = None,
    set_: Set = None,
    since: Annotated[str | None, typer.Option("--since", help="90s, 30m, 2h, 7d ago, or a time.")] = None,
    by: Annotated[
        Literal["line", "speculator", "label", "node"] | None, typer.Option("--by", help="Also group by group.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count verify steps and tokens, what of the drafts was accepted, what is missing, and the bytes that a token
    takes.
    """
    with told():
        settings = settings_of(config, set_)
        from pipeline import trace_queries

        counted = trace_queries.compute_stats(opened(settings), by, moment(since) if since else None)
        if as_json:
            sys.stdout.write(json.dumps(_plain_stats(counted, by), indent=2) + "\n")
            return
        Console().print(_figures_table(counted, by))
        for line in _rest(counted):
            say(line)


@app.command()
def tail(
    config: Config = None,
    set_: Set = None,
    count: Annotated[int, typer.Option("-n", min=0, help="So many of the newest verify steps.")] = 10,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Then those that come, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the newest verify steps: what was drafted, and how much of it the target kept."""
    with told():
        settings = settings_of(config, set_)
        from pipeline.trace_queries import follow_steps, read_newest_steps

        tables = opened(settings)
        rows, version = read_newest_steps(tables, count)
        for part in chain([rows], follow_steps(tables, version, POLL_S) if follow else []):
            for row in part.to_pylist():
                say(json.dumps(row, default=_plain) if as_json else _verify_step(row))
            sys.stdout.flush()


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="One statement; `aurora traces tables` names tables and columns.")],
    config: Config = None,
    set_: Set = None,
    version: Annotated[int | None, typer.Option("--version", min=0, help="An earlier version of the table.")] = None,
    at: Annotated[str | None, typer.Option("--at", help="As the tables were then: 2h, 7d ago, or a time.")] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV; lists as JSON.")] = False,
) -> None:
    """Answer SQL over the tables (DataFusion's)."""
    with told():
        settings = settings_of(config, set_)
        if as_json and as_csv:
            raise UserError("--json or --csv, not both")
        answer = opened(settings).query(query, _moments(query, version, at))
        names = answer.schema.names
        rows = (row for batch in answer for row in batch.to_pylist())
        if as_json:
            _write_json(rows)
        elif as_csv:
            _write_csv(names, rows)
        else:
            _print(names, rows)


@app.command()
def tables(config: Config = None, set_: Set = None, as_json: AsJson = False) -> None:
    """List the tables with their versions, rows and columns."""
    with told():
        settings = settings_of(config, set_)
        from schemas.batches import TABLES

        log = opened(settings)
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
            sys.stdout.write(json.dumps(listed, indent=2) + "\n")
            return
        shown = grid("table", "columns", right=("version", "rows", "bytes"))
        for one in listed:
            figures = (f"{one[name]:,}" for name in ("version", "rows", "bytes"))
            shown.add_row(str(one["table"]), ", ".join(TABLES[str(one["table"])].names), *figures)
        Console().print(shown)


def _moments(query: str, version: int | None, at: str | None) -> dict[str, Moment]:
    """Which state of which table is asked.

    Raises:
        UserError: a version that could be that of several tables.
    """
    from schemas.batches import TABLES

    named = [name for name in TABLES if re.search(rf"\b{name}\b", query)]
    if at is not None:
        if version is not None:
            raise UserError("--version or --at, not both")
        return dict.fromkeys(named, moment(at))
    if version is None:
        return {}
    if len(named) != 1:
        raise UserError(
            f"--version is that of one table, and the query names {', '.join(named) or 'none'}: --at takes them all "
            f"as they were at a time"
        )
    return {named[0]: version}


def _figures_table(counted: TraceStats, by: str | None) -> Table:
    depths = sorted(counted.total.drafted_to)
    figures = ("requests", "tokens", "verify_steps", "drafted", "accepted", "acceptance length")
    shown = grid(by or "verify steps of", right=(*figures, *(f"depth {depth}" for depth in depths)))
    for name, one in [*((name or "(none)", one) for name, one in counted.groups.items()), ("all", counted.total)]:
        length = "" if one.acceptance_length is None else f"{one.acceptance_length:.2f}"
        counts = (
            f"{number:,}"
            for number in (one.requests, one.tokens, one.verify_steps, one.draft_tokens, one.accepted_tokens)
        )
        shown.add_row(name, *counts, length, *(f"{share:.2f}" for share in one.acceptance_by_depth))
    return shown


def _rest(counted: TraceStats) -> Iterator[str]:
    """What has no group."""
    letters = ", ".join(f"{reason} {number:,}" for reason, number in counted.dead_letters.items())
    sizes = ", ".join(f"{name} {size:,}" for name, size in counted.table_bytes.items())
    yield f"requests without their end: {counted.chunks.unfinished:,}; missing chunks: {counted.chunks.missing:,}"
    yield f"dead letters: {letters or 'none'}"
    per_token = "" if counted.bytes_per_token is None else f"; {counted.bytes_per_token:,.0f} a token"
    yield f"bytes of all rows: {sizes}{per_token}"


def _plain_stats(counted: TraceStats, by: str | None) -> dict[str, Any]:
    return {
        **_plain_figures(counted.total),
        **({f"by_{by}": {name: _plain_figures(one) for name, one in counted.groups.items()}} if by else {}),
        "unfinished_requests": counted.chunks.unfinished,
        "missing_chunks": counted.chunks.missing,
        "dead_letters": dict(counted.dead_letters),
        "table_bytes": dict(counted.table_bytes),
        "table_bytes_per_token": counted.bytes_per_token,
    }


def _plain_figures(one: GroupStats) -> dict[str, Any]:
    return {
        "requests": one.requests,
        "tokens": one.tokens,
        "verify_steps": one.verify_steps,
        "draft_tokens": one.draft_tokens,
        "accepted_tokens": one.accepted_tokens,
        "acceptance_length": one.acceptance_length,
        "acceptance_by_depth": one.acceptance_by_depth,
    }


def _verify_step(row: Mapping[str, Any]) -> str:
    """One verify step on one line: the kept tokens of its draft, those that were not, and the target's own."""
    drafted, accepted = row["draft_tokens"], set(row["accepted"])
    kept = " ".join(str(drafted[node]) for node in row["accepted"])
    lost = " ".join(str(token) for node, token in enumerate(drafted) if node not in accepted)
    draft = f"{len(accepted)} of {len(drafted)} kept: {kept} | {lost}" if drafted else "no draft"
    by = f" by {row['speculator']}" if row["speculator"] else ""
    label = f" [{row['label']}]" if row["label"] else ""
    then = "" if row["bonus"] is None else f" -> {row['bonus']}"
    return f"{row['time']:%H:%M:%S.%f} {row['node']} {row['request']} #{row['verify_step']}{label}{by}  {draft}{then}"


def _write_json(rows: Iterator[dict[str, Any]]) -> None:
    """One array, row by row: an answer may be larger than the memory."""
    ending = "[]\n"
    for number, row in enumerate(rows):
        sys.stdout.write(("[\n" if number == 0 else ",\n") + json.dumps(row, default=_plain))
        ending = "\n]\n"
    sys.stdout.write(ending)


def _write_csv(names: Sequence[str], rows: Iterator[dict[str, Any]]) -> None:
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(names)
    for row in rows:
        out.writerow([_cell(value) for value in row.values()])


def _print(names: Sequence[str], rows: Iterator[dict[str, Any]]) -> None:
    shown = grid(*names)
    for number, row in enumerate(rows):
        if number == SHOWN_ROWS:
            hint(f"the first {SHOWN_ROWS} rows; --json or --csv give all")
            break
        shown.add_row(*(str(_cell(value)) for value in row.values()))
    Console().print(shown)


def _cell(value: object) -> object:
    if isinstance(value, list | dict):
        return json.dumps(value, default=_plain)
    return "" if value is None else _plain(value)


def _plain(value: object) -> object:
    """What JSON has no form for: times in ISO form, bytes in base64, decimals as numbers."""
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
