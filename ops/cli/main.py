"""The ``aurora`` command. Heavy imports stand inside the commands, so that each starts with what it needs."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from ops.cli import bench, dead_letters, drift, lineage, promote, replay, tables, topics, traces, versions, vocabulary
from ops.cli.terminal import AsJson, Config, Set, fail, say, settings_of, told
from schemas.settings import SettingsError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A speculator that learns from live LLM traffic, on Kafka, Delta and MLflow.",
)

app.add_typer(bench.app, name="bench")
app.add_typer(topics.app, name="topics")
app.command()(drift.drift)
app.command()(vocabulary.vocabulary)
app.add_typer(tables.app, name="tables")
app.add_typer(dead_letters.app, name="dead")
app.add_typer(traces.app, name="traces")
app.command()(lineage.trace)
app.add_typer(versions.app, name="versions")
app.command()(versions.history)
app.command()(promote.promote)
app.command()(promote.rollback)
app.add_typer(replay.app, name="replay")


@app.command()
def serve(
    config: Config = None,
    set_: Set = None,
    engine: Annotated[
        str | None, typer.Option("--engine", metavar="NAME", help="builtin or sglang, over serve.engine.")
    ] = None,
    flags: Annotated[
        list[str] | None, typer.Argument(metavar="-- SGLANG FLAGS", help="Flags of SGLang's own server.")
    ] = None,
) -> None:
    """Run a serving node."""
    with told():
        settings = settings_of(config, [*(set_ or []), *([f"serve.engine={engine}"] if engine else [])])
        if settings.serve.engine == "sglang":
            from serving.engines.sglang.node import launch

            raise typer.Exit(launch.run(settings, flags or []))
        if flags:
            raise SettingsError(f"{flags[0]}: flags are for SGLang's server: --engine sglang")
        from serving.node import run

        run(settings)


@app.command()
def stream(config: Config = None, set_: Set = None) -> None:
    """Run a stream worker."""
    with told():
        settings = settings_of(config, set_)
        from pipeline.worker import run

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
        from trainer.release.promoter import run

        run(settings)


@app.command()
def up(
    config: Config = None,
    set_: Set = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once all is ready.")] = False,
) -> None:
    """Start the whole stack on this machine and keep it running."""
    with told():
        from ops.local import stack

        settings = settings_of(config, set_)
        if detach:
            stack.up_detached(settings, say)
            say("all is ready; `aurora status` shows it, `aurora down` stops it")
        else:
            from ops.local.screen import StatusLine

            with StatusLine() as line:
                stack.up(settings, line.say, line.show)


@app.command()
def down(config: Config = None, set_: Set = None) -> None:
    """Stop the stack that runs here."""
    with told():
        from ops.local import stack

        stopped = stack.down(settings_of(config, set_))
        say("stopped" if stopped else "nothing runs here")


@app.command()
def status(config: Config = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Say what is served where, and how far each stage lags."""
    with told():
        from rich.console import Console

        from ops.local import stack
        from ops.observe.status import Gatherer, as_table

        settings = settings_of(config, set_)
        running = stack.running(settings)
        overview = Gatherer(stack.settings_here(settings)).gather(
            parts=running.parts if running else {}, count_rows=True
        )
        if as_json:
            sys.stdout.write(overview.model_dump_json(indent=2) + "\n")
        if overview.nothing_runs:
            fail("nothing runs here; `aurora up` starts the stack", code=1)
        if not as_json:
            Console().print(as_table(overview))


@app.command()
def top(
    config: Config = None,
    set_: Set = None,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    looks: Annotated[int | None, typer.Option(min=1, help="End after so many, leaving the last on the screen.")] = None,
) -> None:
    """Watch the loop: serving, stream, trainer and versions on one screen, until Ctrl-C."""
    with told():
        from ops.local import stack
        from ops.observe.top import watch

        watch(stack.settings_here(settings_of(config, set_)), every, looks)


@app.command()
def doctor(config: Config = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Look at everything the processes depend on, and say what to change; exit code 1 where something must be."""
    with told():
        from dataclasses import asdict

        from rich.console import Console

        from ops.local import stack
        from ops.observe.doctor.examination import as_table, examine

        console = Console(stderr=True)
        found = []
        with console.status("looking") as line:
            for finding in examine(stack.settings_here(settings_of(config, set_))):
                found.append(finding)
                line.update(f"looked at: {finding.about}")
        if as_json:
            sys.stdout.write(json.dumps({"findings": [asdict(one) for one in found]}, indent=2) + "\n")
        else:
            Console().print(as_table(found))
        problems = sum(one.level == "problem" for one in found)
        if problems:
            fail(f"{problems} to fix", code=1)


@app.command()
def settings(config: Config = None, set_: Set = None, as_json: AsJson = False) -> None:
    """Print the settings in effect."""
    with told():
        values = settings_of(config, set_).model_dump(mode="json")  # masks secrets
        if as_json:
            sys.stdout.write(json.dumps(values, indent=2) + "\n")
            return
        for section, keys in values.items():
            sys.stdout.write(f"[{section}]\n")
            for key, value in keys.items():
                sys.stdout.write(f"{key} = {_toml(value)}\n")
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
    """Watch a speculator that starts untrained learn from live traffic."""
    with told():
        from ops.demo.run import Options, run

        options = Options(fresh, minutes, concurrency, max_tokens, as_json, not no_ui)
        raise typer.Exit(run(settings_of(config, set_), options))


def _toml(value: object) -> str:
    """A setting as TOML, which writes all but tables as JSON does."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{" + ", ".join(f"{json.dumps(name)} = {json.dumps(option)}" for name, option in value.items()) + "}"


def main() -> None:
    """Entry point of the command."""
    app()


if __name__ == "__main__":
    main()
