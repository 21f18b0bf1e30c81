"""``aurora versions prune``: delete versions that nothing needs."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ops.cli.terminal import (
    AsJson,
    Config,
    DryRun,
    Set,
    echo,
    echo_json,
    load_settings,
    new_table,
    open_tables,
    parse_time,
    user_errors,
)
from ops.cli.versions import LineOption, connect_registry, find_line
from schemas.errors import UserError
from schemas.settings import Settings

if TYPE_CHECKING:
    from datetime import datetime

    from trainer.release.registry import Line
    from trainer.release.version_retention import RetentionPlan


def prune(
    keep: Annotated[int, typer.Option("--keep", metavar="N", min=1, help="Number of newest versions to keep.")],
    config: Config = None,
    set_: Set = None,
    line: LineOption = None,
    served: Annotated[
        str, typer.Option("--served", metavar="TIME", help="Keep versions that nodes have served since, e.g. 7d.")
    ] = "7d",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Delete versions and their files, but none that is new, named, served lately, an anchor, or a parent of these."""
    with user_errors():
        from trainer.release.registry import RegistryError
        from trainer.release.version_retention import plan_retention

        settings, since = load_settings(config, set_), parse_time(served)
        registry = connect_registry(settings)
        of = find_line(settings, registry, line)
        versions, anchors = registry.versions(of.name), _find_anchors(settings, of.name)
        plan = plan_retention(versions, of.aliases, keep, _find_served(settings, of.name, since), anchors)
        deleted: list[str] = []
        try:
            for number in () if dry_run else plan.deleted:
                if number not in registry.aliases(of.name).values():
                    registry.delete(of.name, number)
                    deleted.append(number)
        except RegistryError as error:
            raise UserError(f"{len(deleted)} versions were deleted, then: {error}; repeat the command") from error
        if as_json:
            planned = list(plan.deleted) if dry_run else deleted
            echo_json({"line": of.name, "deleted": planned, "kept": dict(plan.kept), "dry_run": dry_run})
            return
        _print_plan(of, plan, dry_run=dry_run)


def _find_anchors(settings: Settings, line: str) -> set[str]:
    """Return the versions that ``previous`` has named, by the recorded moves: a rollback may return to them."""
    from trainer.release.audit import read_moves

    moves = read_moves(open_tables(settings))
    return {move.to_version for move in moves if move.line == line and move.alias == "previous" and move.to_version}


def _find_served(settings: Settings, line: str, since: datetime) -> set[str]:
    """Return the versions in the traces since a time, and the one that the node of the settings serves."""
    from ops.observe.status import StatusClient
    from pipeline.delta import escape_sql

    # The column `day` selects files. It is that of the record's timestamp: a node's clock may be a day off.
    found = open_tables(settings).query(
        "SELECT DISTINCT speculator FROM traces "  # noqa: S608 - escaped
        f"WHERE line = '{escape_sql(line)}' AND day >= DATE '{since - timedelta(days=1):%Y-%m-%d}' "
        f'AND "time" >= to_timestamp_micros({round(since.timestamp() * 1e6)})'
    )
    versions = {str(row["speculator"]) for row in found.read_all().to_pylist()}
    client = StatusClient(settings)
    try:
        node = client.fetch().serve
    finally:
        client.close()
    return versions | ({node.speculator} if node and node.line == line else set())


def _print_plan(line: Line, plan: RetentionPlan, *, dry_run: bool) -> None:
    table = new_table("version", "kept because")
    for number, why in sorted(plan.kept.items(), key=lambda one: int(one[0])):
        table.add_row(number, why)
    Console().print(table)
    done = "would be deleted" if dry_run else "deleted"
    echo(f"line {line.name}: {', '.join(plan.deleted) or 'nothing'} {done}")
