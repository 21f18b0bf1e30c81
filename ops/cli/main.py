"""The ``aurora`` command: process commands, and the groups of all other commands.

Commands import heavy modules in their bodies, so that each one starts quickly.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Annotated

import typer

from ops.cli import (
    config,
    corpus,
    dlq,
    import_export,
    local_stack,
    observation,
    promotion,
    pruning,
    replay,
    stream,
    tables,
    topics,
    traces,
    versions,
    vocabulary,
)
from ops.cli.terminal import Config, Set, load_settings, user_errors
from schemas.settings import SettingsError

_PROCESSES, _LOCAL, _OBSERVE = "Processes", "Local stack", "Observe"
_DATA, _VERSIONS, _SETUP = "Data", "Speculator versions", "Settings and benchmarks"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train the speculator of an LLM server on its live traffic, with Kafka, Delta Lake and MLflow.",
)


@app.command(rich_help_panel=_PROCESSES)
def serve(
    config: Config = None,
    set_: Set = None,
    engine: Annotated[
        str | None, typer.Option("--engine", metavar="NAME", help="Override serve.engine: builtin, sglang or vllm.")
    ] = None,
    flags: Annotated[
        list[str] | None, typer.Argument(metavar="-- SERVER FLAGS", help="Flags of SGLang's or vLLM's server.")
    ] = None,
) -> None:
    """Run a serving node."""
    with user_errors():
        settings = load_settings(config, [*(set_ or []), *([f"serve.engine={engine}"] if engine else [])])
        if settings.serve.engine == "sglang":
            from serving.engines.sglang.node import launch

            raise typer.Exit(launch.run(settings, flags or []))
        if settings.serve.engine == "vllm":
            from serving.engines.vllm.node import vllm_launch

            raise typer.Exit(vllm_launch.run(settings, flags or []))
        if flags:
            raise SettingsError(f"{flags[0]}: flags are for another server: --engine sglang or vllm")
        from serving.node import run

        run(settings)


app.add_typer(stream.app, name="stream", rich_help_panel=_PROCESSES)


@app.command(rich_help_panel=_PROCESSES)
def train(config: Config = None, set_: Set = None) -> None:
    """Run the trainer."""
    with user_errors():
        settings = load_settings(config, set_)
        from trainer.train import run

        run(settings)


@app.command(rich_help_panel=_PROCESSES)
def promoter(config: Config = None, set_: Set = None) -> None:
    """Run the promoter, which moves aliases to better versions and serves the loop's page."""
    with user_errors():
        settings = load_settings(config, set_)
        from ops.web.loop_page import LoopPage
        from trainer.release.promoter import run

        with LoopPage(settings) as page:
            run(settings, page)


app.command(rich_help_panel=_LOCAL)(local_stack.up)
app.command(rich_help_panel=_LOCAL)(local_stack.down)
app.command(rich_help_panel=_LOCAL)(local_stack.demo)
app.command(rich_help_panel=_OBSERVE)(observation.status)
app.command(rich_help_panel=_OBSERVE)(observation.top)
app.command(rich_help_panel=_OBSERVE)(observation.doctor)
app.command(rich_help_panel=_OBSERVE)(observation.lineage)
app.command(rich_help_panel=_OBSERVE)(observation.drift)
app.add_typer(traces.app, name="traces", rich_help_panel=_DATA)
app.add_typer(tables.app, name="tables", rich_help_panel=_DATA)
app.add_typer(topics.app, name="topics", rich_help_panel=_DATA)
app.add_typer(corpus.app, name="corpus", rich_help_panel=_DATA)
app.add_typer(dlq.app, name="dlq", rich_help_panel=_DATA)
versions.app.command()(promotion.promote)
versions.app.command()(promotion.rollback)
versions.app.command("import")(import_export.import_)
versions.app.command()(import_export.export)
versions.app.command()(pruning.prune)
app.add_typer(versions.app, name="versions", rich_help_panel=_VERSIONS)
app.add_typer(replay.app, name="replay", rich_help_panel=_VERSIONS)
app.command(rich_help_panel=_VERSIONS)(vocabulary.vocabulary)
app.add_typer(config.app, name="config", rich_help_panel=_SETUP)
if find_spec("ops.bench"):  # a checkout has the benchmarks; wheels and images do not
    app.add_typer(import_module("ops.bench.cli").app, name="bench", rich_help_panel=_SETUP)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
