"""Common options of all ``aurora`` commands, and their terminal output."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.table import Table

from schemas.errors import UserError
from schemas.settings import Settings, SettingsError, load

if TYPE_CHECKING:
    from pipeline.delta import DeltaLog

USER_ERROR = 2
INTERRUPTED = 130
"""As a shell reports a command that Ctrl-C ended: a benchmark that was cut must not pass for a complete one."""
_UNITS = {"s": timedelta(seconds=1), "m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}

Config = Annotated[Path | None, typer.Option("--config", help="Settings file. Default: aurora.toml if it exists.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would happen and change nothing.")]


def load_settings(config: Path | None, assignments: list[str] | None) -> Settings:
    """Load the settings and apply ``--set`` options.

    Raises:
        SettingsError: as ``schemas.settings.load``, or an option without ``=``.
    """
    flags: dict[str, str] = {}
    for assignment in assignments or []:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise SettingsError(f"--set {assignment}: expected SECTION.KEY=VALUE")
        flags[name.strip()] = value
    return load(config, flags=flags)


def parse_time(text: str) -> datetime:
    """Parse ``90s``, ``30m``, ``2h`` or ``7d`` (ago), or an ISO time (UTC without a zone).

    Raises:
        UserError: the text has another format.
    """
    if ago := re.fullmatch(r"([0-9]{1,6})([smhd])", text):
        return datetime.now(UTC) - int(ago[1]) * _UNITS[ago[2]]
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"{text!r} is not a time: write 90s, 30m, 2h, 7d, or 2026-11-23T14:00") from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def open_tables(settings: Settings) -> DeltaLog:
    """Return the Delta tables.

    Raises:
        UserError: the tables do not exist.
    """
    from pipeline.delta import DeltaLog

    uri = settings.tables.uri
    if "://" not in uri and not Path(uri).exists():
        raise UserError(f"no tables in {Path(uri).resolve()} (tables.uri); a stream worker creates them")
    return DeltaLog(settings.tables)


@contextmanager
def user_errors() -> Iterator[None]:
    """Print errors that a user can fix as one line and exit with code 2; exit silently with 130 on Ctrl-C."""
    try:
        yield
    except (UserError, SettingsError) as error:
        fail(str(error), code=USER_ERROR)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def echo(text: str) -> None:
    """Print a line."""
    typer.echo(text)


def echo_note(text: str) -> None:
    """Print a line to stderr, beside output for programs."""
    typer.echo(text, err=True)


def echo_json(value: object, default: Callable[[Any], Any] | None = None) -> None:
    """Print a value as indented JSON."""
    sys.stdout.write(to_json(value, default, indent=2) + "\n")


def to_json(value: object, default: Callable[[Any], Any] | None = None, indent: int | None = None) -> str:
    """Return a value as JSON, with null in place of NaN and infinities, which JSON lacks."""
    return json.dumps(_without_nan(value), default=default, indent=indent, allow_nan=False)


def _without_nan(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list() | tuple():
            return [_without_nan(one) for one in value]
        case dict():
            return {key: _without_nan(one) for key, one in value.items()}
        case _:
            return value


def fail(text: str, code: int) -> NoReturn:
    """Print an error line and exit."""
    typer.echo(f"aurora: {text}", err=True)
    raise typer.Exit(code)


def new_table(*columns: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    """Return a table without borders: text columns, then right-aligned columns."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold", min_width=min(len(column), 12))
    for column in right:
        table.add_column(column, justify="right")
    return table
