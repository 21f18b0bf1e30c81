"""``aurora versions prune``: delete versions that nothing needs."""

from __future__ import annotations

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

    from pipeline.delta import DeltaLog
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
        from trainer.release.audit import read_moves
        from trainer.release.registry import RegistryError
        from trainer.release.version_retention import delete_versions, find_anchors, plan_retention

        settings, since = load_settings(config, set_), parse_time(served)
        registry = connect_registry(settings)
        of = find_line(settings, registry, line)
        tables = open_tables(settings)
        recent, anchors = _find_served(settings, tables, of.name, since), find_anchors(read_moves(tables), of.name)
        plan = plan_retention(registry.versions(of.name), of.aliases, keep, recent, anchors)
        deleted: list[str] = []
        try:
            for number in () if dry_run else delete_versions(registry, of.name, plan.deleted):
                deleted.append(number)  # noqa: PERF402 - a failure leaves what was deleted before
        except RegistryError as error:
            raise UserError(f"{len(deleted)} versions were deleted, then: {error}; repeat the command") from error
        if as_json:
            planned = list(plan.deleted) if dry_run else deleted
            echo_json({"line": of.name, "deleted": planned, "kept": dict(plan.kept), "dry_run": dry_run})
            return
        _print_plan(of, plan, dry_run=dry_run)


def _find_served(settings: Settings, tables: DeltaLog, line: str, since: datetime) -> set[str]:
    """Return the versions in the traces since a time, and the one that the node of the settings serves."""
    from ops.observe.status import StatusClient
    from trainer.release.version_retention import find_served

    client = StatusClient(settings)
    try:
        node = client.fetch().serve
    finally:
        client.close()
    return find_served(tables, line, since) | ({node.speculator} if node and node.line == line else set())


def _print_plan(line: Line, plan: RetentionPlan, *, dry_run: bool) -> None:
    table = new_table("version", "kept because")
    for number, why in sorted(plan.kept.items(), key=lambda one: int(one[0])):
        table.add_row(number, why)
    Console().print(table)
    done = "would be deleted" if dry_run else "deleted"
    echo(f"line {line.name}: {', '.join(plan.deleted) or 'nothing'} {done}")
