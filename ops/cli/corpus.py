"""``aurora corpus``: refill and describe the answers topic, from which nodes fill the suffix drafter's corpus."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ops.cli.terminal import (
    INTERRUPTED,
    AsJson,
    Config,
    DryRun,
    Set,
    echo_json,
    echo_note,
    load_settings,
    new_table,
    open_tables,
    parse_time,
    user_errors,
)
from schemas.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.answers_topic import RebuildCounts, TopicStats

_SHOWN = 10

app = typer.Typer(no_args_is_help=True, help="Refill and describe the topic of answers that nodes draft from.")


@app.command()
def stats(config: Config = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Count the answers on the topic: tokens, bytes per token, age, labels, nodes and lines."""
    with user_errors():
        settings = load_settings(config, set_)
        from pipeline.answers_topic import describe_topic

        found = describe_topic(settings.kafka)
        if as_json:
            echo_json(_stats_json(found))
            return
        for table in build_tables(found, datetime.now(UTC)):
            Console().print(table)
        if found.corrupt:
            echo_note(f"{found.corrupt} records are no answers; nodes skip them")


@app.command()
def rebuild(
    config: Config = None,
    set_: Set = None,
    begin: Annotated[
        str | None, typer.Option("--from", help="Answers since 2h, 7d ago, or a time. Default: kafka.retention ago.")
    ] = None,
    end: Annotated[str | None, typer.Option("--to", help="Answers before 2h, 7d ago, or a time. Default: now.")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Publish the answers in the table traces to the topic again, oldest first; Ctrl-C stops between two parts."""
    with user_errors():
        settings = load_settings(config, set_)
        scope = settings.serve.suffix_scope
        if scope == "request":
            raise UserError("serve.suffix_scope is request: no node drafts from answers; choose label, node or fleet")
        from pipeline import answers_topic

        now = datetime.now(UTC)
        kept = now - timedelta(seconds=settings.kafka.retention)
        first, last = parse_time(begin) if begin else kept, parse_time(end) if end else now
        if first < kept:
            echo_note(f"answers before {kept:%Y-%m-%dT%H:%M:%SZ} are not published: the topic keeps kafka.retention")
        tables = open_tables(settings)
        requests = answers_topic.list_finished(tables, max(first, kept), last)
        counts, cut_short = answers_topic.RebuildCounts(len(requests)), False
        if not dry_run:
            counts, cut_short = _report_progress(answers_topic.rebuild(tables, settings.kafka, requests, scope), counts)
        if as_json:
            echo_json(asdict(counts))
        else:
            Console().print(_build_counts_table(counts))
        if dry_run:
            echo_note("nothing was published")
        if cut_short:
            raise typer.Exit(INTERRUPTED)


def build_tables(found: TopicStats, now: datetime) -> Iterator[Table]:
    """Yield the totals, and the tokens of each label, node and line."""
    total = new_table("oldest", "newest", right=("answers", "tokens", "bytes", "bytes per token"))
    ages = (_format_age(now, time) for time in (found.oldest, found.newest))
    per_token = f"{found.bytes_per_token:.2f}" if found.bytes_per_token is not None else "-"
    total.add_row(*ages, str(found.answers), str(found.tokens), str(found.record_bytes), per_token)
    yield total
    groups = (("label", found.tokens_by_label), ("node", found.tokens_by_node), ("line", found.tokens_by_line))
    for name, counted in groups:
        table = new_table(name, right=("tokens",))
        for value, tokens in counted.most_common(_SHOWN):
            table.add_row("(none)" if value is None else value, str(tokens))
        if len(counted) > _SHOWN:
            table.add_row(f"({len(counted) - _SHOWN} more)", "")
        if counted:
            yield table


def _format_age(now: datetime, time: datetime | None) -> str:
    return f"{(now - time).total_seconds() / 60:.0f} min ago" if time else "-"


def _report_progress(parts: Iterator[RebuildCounts], counts: RebuildCounts) -> tuple[RebuildCounts, bool]:
    """Print the progress of a rebuild; return the counts at its end, and whether Ctrl-C ended it early."""
    try:
        for counts in parts:  # noqa: PLR1704 - the last counts are the result
            echo_note(f"{counts.published} of {counts.requests} answers published")
    except KeyboardInterrupt:
        echo_note("stopped: nodes use the answers that were published")
        return counts, True
    return counts, False


def _build_counts_table(counts: RebuildCounts) -> Table:
    shown = asdict(counts)
    table = new_table(right=tuple(name.replace("_", " ") for name in shown))
    table.add_row(*map(str, shown.values()))
    return table


def _stats_json(found: TopicStats) -> dict[str, Any]:
    def grouped(counts: dict[Any, int], name: str) -> list[dict[str, Any]]:
        return [{name: value, "tokens": tokens} for value, tokens in counts.items()]

    return {
        "answers": found.answers,
        "tokens": found.tokens,
        "bytes": found.record_bytes,
        "bytes_per_token": found.bytes_per_token,
        "corrupt": found.corrupt,
        "oldest": found.oldest.isoformat() if found.oldest else None,
        "newest": found.newest.isoformat() if found.newest else None,
        "labels": grouped(found.tokens_by_label, "label"),
        "nodes": grouped(found.tokens_by_node, "node"),
        "lines": grouped(found.tokens_by_line, "line"),
    }
