"""``aurora replay``: history turned into answers, from the tables alone."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ops.cli.terminal import AsJson, Config, Set, hint, moment, opened, say, settings_of, told
from ops.report.writing import write_page
from schemas.errors import UserError

if TYPE_CHECKING:
    from schemas.settings import Settings
    from trainer.data.target import Target
    from trainer.replay.request_evaluation import RequestEvaluation

PROGRESS_EVERY = 50

app = typer.Typer(no_args_is_help=True, help="History turned into answers: what would have been, from the tables.")

From = Annotated[str | None, typer.Option("--from", help="Requests that began then or later: 2h, 7d ago, or a time.")]
To = Annotated[str | None, typer.Option("--to", help="Requests that began before then.")]
Label = Annotated[str | None, typer.Option("--label", help="Requests of this label of traffic alone.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with the plot.")]


@app.command()
def score(  # noqa: PLR0913, PLR0917 - one for each flag
    versions: Annotated[
        str, typer.Option(metavar="V,V", help="Numbers, aliases, `day-0`, or checkpoint folders, with commas.")
    ],
    config: Config = None,
    set_: Set = None,
    begin: From = None,
    end: To = None,
    at_version: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Table `accepted` as it was at this version.")
    ] = None,
    label: Label = None,
    lookahead: Annotated[
        int | None,
        typer.Option(min=1, max=16, metavar="K", help="Drafted tokens; serve.num_speculative_tokens if not given."),
    ] = None,
    requests: Annotated[bool, typer.Option("--requests", help="With --json: every request too.")] = False,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Say what versions would have accepted on logged requests; exact for greedy ones, expected for sampled ones."""
    with told():
        settings = settings_of(config, set_)
        names = [name for name in versions.split(",") if name]
        if not names or len(set(names)) < len(names):
            raise UserError("--versions: give at least one, and none twice")
        tables = opened(settings)
        import torch

        from schemas.telemetry import logs
        from trainer.data.target import FrozenTarget
        from trainer.replay.named_drafts import load_drafts
        from trainer.replay.past_requests import RequestFilter, list_requests, pin_versions, read_requests
        from trainer.replay.request_evaluation import evaluate

        logs.configure("replay", "warning")
        torch.set_num_threads(settings.train.num_threads)
        target = _target(settings)
        named = load_drafts(settings, target, names)
        span = RequestFilter(target.fingerprint, _time(begin), _time(end), label)
        at, counts = pin_versions(tables, at_version), Counter[str]()
        chosen = list_requests(tables, span, at)
        states = FrozenTarget(Path(settings.target.path), target.day_0.shape.capture_layers).compute_states
        past = read_requests(tables, chosen, at, states, counts)

        def done(number: int) -> None:
            if number % PROGRESS_EVERY == 0:
                hint(f"{number} of {len(chosen)} requests")

        longest = lookahead or settings.serve.num_speculative_tokens
        found = evaluate(named, target.embeddings_VH, past, longest, at, counts, done)
        if html is not None:
            from ops.replay.score_page import page

            write_page("--html", html, page(found))
            hint(f"{html}: written")
        if as_json:
            sys.stdout.write(json.dumps(found.summary(requests=requests), indent=2) + "\n")
        else:
            _print(found)


@app.command()
def train(  # noqa: PLR0913, PLR0917 - one for each flag
    config: Annotated[
        list[Path], typer.Option("--config", help="Settings of a variant, named by its file; repeatable.")
    ],
    set_: Set = None,
    begin: Annotated[
        str | None, typer.Option("--from", metavar="version:N", help="Read behind this version of accepted, or a time.")
    ] = None,
    end: Annotated[
        str | None, typer.Option("--to", metavar="version:N", help="Up to this version, or a time; the newest if none.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the experiment; the variants' names where none is given.")
    ] = None,
    line: Annotated[str | None, typer.Option(help="Line that the rows came from; the first variant's if none.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Variants at a time.")] = 1,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="Run them on this Ray cluster instead.")
    ] = None,
    html: Html = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write the plot alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let variants learn from the same past in its time order, scored on each batch first; goes on where it was."""
    with told():
        from ops.replay import training
        from schemas.telemetry import logs
        from trainer.release.registry import RegistryError

        logs.configure("replay", "warning")
        variants = training.variants(config, lambda file: settings_of(file, set_))
        first = next(iter(variants.values()))
        tables = opened(first)
        from ops.replay import mlflow_runs
        from ops.replay.comparison import Comparison, table
        from ops.replay.train_page import page, picture

        named = name or "-".join(variants)
        plan, tasks = training.prepared(variants, tables, named, line or _target(first).line, begin, end)
        hint(f"experiment {named} holds versions {plan.span.accepted[0]} to {plan.span.accepted[1]} of accepted")
        found = Comparison(plan, tuple(training.run(tasks, processes, hint, ray)))
        try:
            hint(f"MLflow run {mlflow_runs.log(first, found, training.folder_of(first, named), variants)}")
        except RegistryError as error:
            hint(f"no runs in MLflow: {error}")
        for option, file, text in (("--html", html, page), ("--svg", svg, picture)):
            if file is not None:
                write_page(option, file, text(found))
                hint(f"{file}: written")
        if as_json:
            sys.stdout.write(json.dumps(found.summary(), indent=2) + "\n")
        else:
            Console().print(table(found))


@app.command()
def serve(  # noqa: PLR0913, PLR0917 - one for each flag
    url: Annotated[str, typer.Option(metavar="URL", help="Of the node, as http://127.0.0.1:8000.")],
    config: Config = None,
    set_: Set = None,
    speed: Annotated[float, typer.Option(min=0.001, help="Times the recorded pace: 2 sends twice as fast.")] = 1.0,
    fastest: Annotated[
        bool, typer.Option("--max", help="Keep no pace: a request as soon as there is a place.")
    ] = False,
    at_once: Annotated[int, typer.Option(min=1, metavar="N", help="With --max, places.")] = 32,
    begin: From = None,
    end: To = None,
    label: Label = None,
    first: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N of them.")] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Let the node trace it: the load becomes history too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Send recorded prompts to a node again, at the times at which they came: a load test with real arrivals."""
    with told():
        tables = opened(settings_of(config, set_))
        from ops.loadgen.arrivals import arrivals
        from ops.loadgen.load_table import table
        from ops.loadgen.replay_load import Plan, send

        wanted = arrivals(tables, _time(begin), _time(end), label)[:first]
        if not wanted:
            raise UserError("no request to send: none in that span; see `aurora traces stats`")
        if not fastest:
            hint(f"{len(wanted)} requests over {(wanted[-1].at - wanted[0].at) / speed:.0f} seconds")
        outcome = send(Plan(url, None if fastest else speed, at_once, trace), wanted, hint)
        if as_json:
            sys.stdout.write(json.dumps(outcome.summary(), indent=2) + "\n")
        else:
            Console().print(table(outcome))
    if outcome.failures:
        raise typer.Exit(1)


@app.command(name="import")
def import_(
    folder: Annotated[Path, typer.Argument(help="Traces in files, as `aurora bench learning --record` keeps them.")],
    config: Config = None,
    set_: Set = None,
) -> None:
    """Bring recorded traces into the tables, as the stream would have; what is there already stays as it is."""
    with told():
        settings = settings_of(config, set_)
        from ops.replay.importing import bring
        from pipeline.delta import DeltaLog

        for done, of in bring(DeltaLog(settings.tables), folder, settings.stream.context_tokens):
            hint(f"{done} of {of} requests")
        say(f"{folder}: all requests are in {settings.tables.uri}")


@app.command(name="list")
def list_(config: Config = None, set_: Set = None, as_json: AsJson = False) -> None:
    """List the experiments that hold past versions, and how many bytes they keep."""
    with told():
        tables = opened(settings_of(config, set_))
        from pipeline.holds import list_holds, measure_hold

        listed = [{**asdict(one), "bytes": asdict(measure_hold(tables, one))} for one in list_holds(tables)]
        if as_json:
            sys.stdout.write(json.dumps(listed, indent=2) + "\n")
            return
        shown = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("experiment", "table", "since"):
            shown.add_column(column, overflow="fold")
        for column in ("versions", "bytes", "of them only held"):
            shown.add_column(column, justify="right")
        for one in list_holds(tables):
            sizes, since = measure_hold(tables, one), datetime.fromtimestamp(one.time_us / 1e6, UTC)
            span = f"{one.after_version} - {one.up_to_version}"
            shown.add_row(one.experiment, one.table, f"{since:%F %H:%M}", span, f"{sizes.total:,}", f"{sizes.held:,}")
        Console().print(shown)


@app.command()
def release(
    experiment: Annotated[str, typer.Argument(metavar="NAME", help="Of the experiment; `aurora replay list` has it.")],
    config: Config = None,
    set_: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be let go, and change nothing.")] = False,
) -> None:
    """Let go of what an experiment holds: maintenance may delete it then."""
    with told():
        tables = opened(settings_of(config, set_))
        from pipeline import holds

        mine = [one for one in holds.list_holds(tables) if one.experiment == experiment]
        for one in mine if dry_run else holds.release_holds(tables, experiment):
            say(f"{one.table}: versions {one.after_version} to {one.up_to_version}")
        if dry_run:
            hint("nothing was changed")


def _target(settings: Settings) -> Target:
    from schemas.speculator.checkpoint import CheckpointError
    from trainer.data.target import read_target

    try:
        return read_target(settings)
    except CheckpointError as error:
        raise UserError(str(error)) from error


def _time(text: str | None) -> datetime | None:
    return moment(text) if text else None


def _print(found: RequestEvaluation) -> None:
    from ops.replay.score_table import notes, tables

    for table in tables(found):
        Console().print(table)
    for line in notes(found):
        say(line)
