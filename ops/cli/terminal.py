"""What all commands of ``aurora`` share: their common flags, and how they speak to the person at the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from schemas.errors import UserError
from schemas.settings import Settings, SettingsError, load

if TYPE_CHECKING:
    from pipeline.delta import DeltaLog

USER_ERROR = 2
_UNITS = {"s": timedelta(seconds=1), "m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}

Config = Annotated[Path | None, typer.Option("--config", help="Settings file; aurora.toml is read when it is there.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting, over file and environment; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def settings_of(config: Path | None, assignments: list[str] | None) -> Settings:
    """The settings with the flags over them.

    Raises:
        SettingsError: as ``schemas.settings.load``, or a flag without ``=``.
    """
    flags: dict[str, str] = {}
    for assignment in assignments or []:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise SettingsError(f"--set {assignment}: expected SECTION.KEY=VALUE")
        flags[name.strip()] = value
    return load(config, flags=flags)


def moment(text: str) -> datetime:
    """The time that ``90s``, ``30m``, ``2h`` or ``7d`` (ago) or an ISO time (UTC without a zone) names.

    Raises:
        UserError: it is written otherwise.
    """
    if ago := re.fullmatch(r"([0-9]{1,6})([smhd])", text):
        return datetime.now(UTC) - int(ago[1]) * _UNITS[ago[2]]
    try:
        named = datetime.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"{text!r} is no time: write 90s, 30m, 2h, 7d, or as 2026-11-23T14:00") from error
    return named if named.tzinfo else named.replace(tzinfo=UTC)


def opened(settings: Settings) -> DeltaLog:
    """The tables, for a look at them.

    Raises:
        UserError: there are none.
    """
    from pipeline.delta import DeltaLog

    uri = settings.tables.uri
    if "://" not in uri and not Path(uri).exists():
        raise UserError(f"no tables in {Path(uri).resolve()} (tables.uri); a stream worker makes them")
    return DeltaLog(settings.tables)


@contextmanager
def told() -> Iterator[None]:
    """Turn what a user can put right into one line and exit code 2; Ctrl-C ends without a word."""
    try:
        yield
    except (UserError, SettingsError) as error:
        fail(str(error), code=USER_ERROR)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def say(text: str) -> None:
    """One line for the person in front of the terminal."""
    typer.echo(text)


def hint(text: str) -> None:
    """One line for the person, beside an output that a program reads."""
    typer.echo(text, err=True)


def fail(text: str, code: int) -> NoReturn:
    """Print an error line and exit."""
    typer.echo(f"aurora: {text}", err=True)
    raise typer.Exit(code)
