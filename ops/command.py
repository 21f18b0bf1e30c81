"""What all commands of ``aurora`` share: their common flags, and how they speak to the person at the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from schemas.errors import UserError
from schemas.settings import Settings, SettingsError, load

USER_ERROR = 2

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
