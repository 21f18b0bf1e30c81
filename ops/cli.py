"""The ``aurora`` command. Heavy imports stand inside the commands, so that each starts with what it needs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ops.errors import UserError
from schemas.settings import Settings, SettingsError, load

USER_ERROR = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A speculator that learns from live LLM traffic, on Kafka, Delta and MLflow.",
)

Config = Annotated[Path | None, typer.Option("--config", help="Settings file; aurora.toml is read when it is there.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="One setting, over file and environment; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def serve(config: Config = None, set_: Set = None) -> None:
    """Run a serving node."""
    with told():
        settings = settings_of(config, set_)
        from serving.node import run

        run(settings)


@app.command()
def stream(config: Config = None, set_: Set = None) -> None:
    """Run a stream worker."""
    with told():
        settings = settings_of(config, set_)
        from pipeline.app import run

        run(settings)


@app.command()
def train(config: Config = None, set_: Set = None) -> None:
    """Run the trainer."""
    with told():
        settings = settings_of(config, set_)
        from trainer.train import run

        run(settings)


@app.command()
def promoter(config: Config = None, set_: Set = None) -> None:
    """Run the promoter, which moves aliases to better versions."""
    with told():
        settings = settings_of(config, set_)
        from trainer.promoter import run

        run(settings)


@app.command()
def up(
    config: Config = None,
    set_: Set = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once all is ready.")] = False,
) -> None:
    """Start the whole stack on this machine and keep it running."""
    with told():
        from ops import stack

        settings = settings_of(config, set_)
        if detach:
            stack.up_detached(settings, say)
            say("all is ready; `aurora status` shows it, `aurora down` stops it")
        else:
            from ops.screen import StatusLine

            with StatusLine() as line:
                stack.up(settings, line.say, line.show)


@app.command()
def down(config: Config = None, set_: Set = None) -> None:
    """Stop the stack that runs here."""
    with told():
        from ops import stack

        stopped = stack.down(settings_of(config, set_))
        say("stopped" if stopped else "nothing runs here")


@app.command()
def status(config: Config = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Say what is served where, and how far each stage lags."""
    with told():
        from rich.console import Console

        from ops import stack
        from ops.status import Gatherer, as_table

        settings = settings_of(config, set_)
        running = stack.running(settings)
        if running:  # it may have been started with other flags than this command
            settings = load(environ=running.environ)
        overview = Gatherer(settings).gather(parts=running.parts if running else {}, count_rows=True)
        if as_json:
            sys.stdout.write(overview.model_dump_json(indent=2) + "\n")
        if overview.nothing_runs:
            fail("nothing runs here; `aurora up` starts the stack", code=1)
        if not as_json:
            Console().print(as_table(overview))


@app.command()
def settings(config: Config = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Print the settings in effect."""
    with told():
        values = settings_of(config, set_).model_dump()
        if as_json:
            sys.stdout.write(json.dumps(values, indent=2) + "\n")
            return
        for section, keys in values.items():
            sys.stdout.write(f"[{section}]\n")
            for key, value in keys.items():
                sys.stdout.write(f"{key} = {json.dumps(value)}\n")
            sys.stdout.write("\n")


@app.command()
def demo(
    config: Config = None,
    set_: Set = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what earlier runs left.")] = False,
    minutes: Annotated[float, typer.Option(min=2, help="Length of the whole demo.")] = 9.5,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest answer, in tokens.")] = 64,
    as_json: AsJson = False,
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Plain lines instead of a live screen.")] = False,
) -> None:
    """Watch a speculator that starts from random weights learn from live traffic."""
    with told():
        from ops.demo import Options, run

        options = Options(fresh, minutes, concurrency, max_tokens, as_json, not no_ui)
        raise typer.Exit(run(settings_of(config, set_), options))


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


def fail(text: str, code: int) -> NoReturn:
    """Print an error line and exit."""
    typer.echo(f"aurora: {text}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
