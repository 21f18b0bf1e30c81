"""``aurora replay``: evaluate, train and load-test with recorded requests."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ops.cli.terminal import (
    INTERRUPTED,
    AsJson,
    Config,
    DryRun,
    Set,
    echo,
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
    from ops.loadgen.load import Load
    from schemas.settings import Settings
    from trainer.data.target import Target

_PROGRESS_REQUESTS = 50
_PROGRESS_S = 5.0
_LOAD_TIMEOUT_S = 600.0

app = typer.Typer(no_args_is_help=True, help="Evaluate, train and load-test with recorded requests.")

From = Annotated[str | None, typer.Option("--from", help="Requests since 2h, 7d ago, or a time.")]
To = Annotated[str | None, typer.Option("--to", help="Requests before this time.")]
Label = Annotated[str | None, typer.Option("--label", help="Requests with this traffic label.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with charts.")]


@app.command()
def evaluate(  # noqa: PLR0913, PLR0917 - one for each flag
    versions: Annotated[
        str,
        typer.Option(metavar="V,V", help="Numbers, aliases, `day-0` or checkpoint folders, separated by commas."),
    ] = "",
    drafter: Annotated[
        str,
        typer.Option(metavar="D,D", help="`eagle`: each version. `suffix`: no version. `hybrid`: each with `suffix`."),
    ] = "eagle",
    config: Config = None,
    set_: Set = None,
    begin: From = None,
    end: To = None,
    at_version: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Use table `accepted` at this version.")
    ] = None,
    label: Label = None,
    lookahead: Annotated[
        int | None,
        typer.Option(min=1, max=16, metavar="K", help="Draft tokens in a row. Default: that of the nodes."),
    ] = None,
    requests: Annotated[bool, typer.Option("--requests", help="Include every request in the JSON.")] = False,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Compute the acceptance of drafters on recorded requests: exact for greedy ones, expected for sampled ones."""
    with user_errors():
        settings = load_settings(config, set_)
        names = _split_names("--versions", versions)
        kinds = _split_names("--drafter", drafter)
        tables = open_tables(settings)
        import torch

        from ops.replay.evaluation_report import build_tables, list_notes, render_evaluation_page
        from ops.replay.suffix_replay import NodeSuffixReplay
        from schemas.telemetry import logs
        from trainer.data.target import FrozenTarget
        from trainer.replay.named_drafts import load_drafts
        from trainer.replay.past_requests import RequestFilter, list_requests, pin_versions, read_requests
        from trainer.replay.request_evaluation import evaluate as evaluate_requests
        from trainer.replay.request_evaluation import list_drafters

        logs.configure("replay", "warning")
        torch.set_num_threads(settings.train.num_threads)
        target = _read_target(settings)
        drafters = list_drafters(kinds, load_drafts(settings, target, names))
        span = RequestFilter(target.fingerprint, _parse_optional_time(begin), _parse_optional_time(end), label)
        at, counts = pin_versions(tables, at_version), Counter[str]()
        chosen = list_requests(tables, span, at)
        layers, device = target.day_0.shape.capture_layers, target.embeddings_VH.device
        states = FrozenTarget(Path(settings.target.path), layers, device).compute_states
        past = read_requests(tables, chosen, at, states, counts)

        def report_progress(done: int) -> None:
            if done % _PROGRESS_REQUESTS == 0:
                echo_note(f"{done} of {len(chosen)} requests")

        longest = lookahead or settings.serve.num_speculative_tokens
        suffix = None if kinds == ["eagle"] else NodeSuffixReplay(settings, lookahead)
        found = evaluate_requests(
            drafters, target.embeddings_VH, past, longest, at, counts, report_progress, suffix=suffix
        )
        if html is not None:
            _write_page("--html", html, render_evaluation_page(found))
        if as_json:
            echo_json(found.summary(requests=requests))
            return
        for table in build_tables(found):
            Console().print(table)
        for note in list_notes(found):
            echo(note)


@app.command()
def train(  # noqa: PLR0913, PLR0917 - one for each flag
    config: Annotated[
        list[Path], typer.Option("--config", help="Settings of a variant; the file name is its name. Repeatable.")
    ],
    set_: Set = None,
    begin: Annotated[
        str | None, typer.Option("--from", metavar="version:N", help="Start after this version of accepted, or a time.")
    ] = None,
    end: Annotated[
        str | None, typer.Option("--to", metavar="version:N", help="End at this version, or a time. Default: newest.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the experiment. Default: the variant names.")] = None,
    line: Annotated[str | None, typer.Option(help="Line of the rows. Default: line of the first variant.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Parallel variants.")] = 1,
    ray: Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help="Run on this Ray cluster.")] = None,
    html: Html = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write the acceptance chart.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train variants on the same span in commit order and score each batch before its step; resume where it ended."""
    with user_errors():
        from ops.replay import experiment_runner
        from schemas.telemetry import logs
        from trainer.release.registry import RegistryError

        logs.configure("replay", "warning")
        variants = experiment_runner.load_variants(config, lambda file: load_settings(file, set_))
        first = next(iter(variants.values()))
        tables = open_tables(first)
        from ops.replay.experiment_report import Comparison, build_table, render_chart, render_experiment_page
        from ops.replay.mlflow_log import log_experiment

        name = name or "-".join(variants)
        line = line or _read_target(first).line
        plan, tasks = experiment_runner.prepare_experiment(variants, tables, name, line, begin, end)
        echo_note(f"experiment {name} holds versions {plan.span.accepted[0]} to {plan.span.accepted[1]} of accepted")
        comparison = Comparison(plan, tuple(experiment_runner.run_tasks(tasks, processes, echo_note, ray)))
        try:
            folder = experiment_runner.experiment_folder(first, name)
            echo_note(f"MLflow run {log_experiment(first, comparison, folder, variants)}")
        except RegistryError as error:
            echo_note(f"no runs in MLflow: {error}")
        if html is not None:
            _write_page("--html", html, render_experiment_page(comparison))
        if svg is not None:
            _write_page("--svg", svg, render_chart(comparison))
        if as_json:
            echo_json(comparison.summary())
        else:
            Console().print(build_table(comparison))


@app.command()
def load(  # noqa: PLR0913, PLR0917 - one for each flag
    url: Annotated[str, typer.Option(metavar="URL", help="Node, such as http://127.0.0.1:8000.")],
    config: Config = None,
    set_: Set = None,
    speed: Annotated[float, typer.Option(min=0.001, help="Factor over the recorded pace.")] = 1.0,
    fastest: Annotated[bool, typer.Option("--max", help="Ignore arrival times and keep all clients busy.")] = False,
    concurrency: Annotated[int, typer.Option(min=1, metavar="N", help="Clients with --max.")] = 32,
    begin: From = None,
    end: To = None,
    label: Label = None,
    first: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N requests.")] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Let the node trace the requests.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send recorded requests to a node at their recorded arrival times and measure latency."""
    with user_errors():
        settings = load_settings(config, set_)
        tables = open_tables(settings)
        from ops.loadgen.load import Load, read_api_key, read_model_name
        from ops.loadgen.recorded import read_recorded, schedule_requests
        from ops.loadgen.summary import build_table, summarize_load

        recorded = read_recorded(tables, _parse_optional_time(begin), _parse_optional_time(end), label)[:first]
        if not recorded:
            raise UserError("no recorded requests in this span; see `aurora traces stats`")
        if not fastest:
            echo_note(
                f"{len(recorded)} requests over {(recorded[-1].arrival - recorded[0].arrival) / speed:.0f} seconds"
            )
        key = read_api_key(settings.serve)
        requests = schedule_requests(recorded, read_model_name(url, key), speed=speed, trace=trace)
        running = Load(
            url,
            requests,
            concurrency if fastest else None,
            timeout_s=_LOAD_TIMEOUT_S,
            error_pause_s=0.0,
            api_key=key,
        )
        cut_short = _run_load(running, len(requests))
        summary = summarize_load(running, len(requests), cut_short=cut_short)
        if as_json:
            echo_json(summary)
        else:
            Console().print(build_table(summary))
    if cut_short:
        raise typer.Exit(INTERRUPTED)
    if running.errors:
        raise typer.Exit(1)


@app.command(name="import")
def import_(
    folder: Annotated[Path, typer.Argument(help="Trace files from `aurora bench learning --record`.")],
    config: Config = None,
    set_: Set = None,
) -> None:
    """Import trace files into the tables; skip traces that are already there."""
    with user_errors():
        settings = load_settings(config, set_)
        from ops.replay.trace_import import import_traces
        from pipeline.delta import DeltaLog

        for done, total in import_traces(DeltaLog(settings.tables), folder, settings.stream.context_tokens):
            echo_note(f"{done} of {total} requests")
        echo(f"{folder}: all requests are in {settings.tables.uri}")


@app.command(name="list")
def list_(config: Config = None, set_: Set = None, as_json: AsJson = False) -> None:
    """List the retention holds of experiments and their size in bytes."""
    with user_errors():
        tables = open_tables(load_settings(config, set_))
        from pipeline.holds import list_holds, measure_hold

        holds = [(hold, measure_hold(tables, hold)) for hold in list_holds(tables)]
        if as_json:
            echo_json([{**asdict(hold), "bytes": asdict(size)} for hold, size in holds])
            return
        table = new_table("experiment", "table", "since", right=("versions", "bytes", "held only"))
        for hold, size in holds:
            since = datetime.fromtimestamp(hold.time_us / 1e6, UTC)
            span = f"{hold.after_version} - {hold.up_to_version}"
            table.add_row(hold.experiment, hold.table, f"{since:%F %H:%M}", span, f"{size.total:,}", f"{size.held:,}")
        Console().print(table)


@app.command()
def release(
    experiment: Annotated[str, typer.Argument(metavar="NAME", help="Experiment, as in `aurora replay list`.")],
    config: Config = None,
    set_: Set = None,
    dry_run: DryRun = False,
) -> None:
    """Release the retention holds of an experiment, so that maintenance can delete its data."""
    with user_errors():
        tables = open_tables(load_settings(config, set_))
        from pipeline import holds

        matching = [hold for hold in holds.list_holds(tables) if hold.experiment == experiment]
        for hold in matching if dry_run else holds.release_holds(tables, experiment):
            echo(f"{hold.table}: versions {hold.after_version} to {hold.up_to_version}")
        if dry_run:
            echo_note("nothing was changed")


def _split_names(option: str, text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if len(set(names)) < len(names):
        raise UserError(f"{option}: give each name only once")
    return names


def _run_load(load: Load, requests: int) -> bool:
    """Run a load and print its progress; return whether Ctrl-C ended it early."""
    load.start()
    started = datetime.now(UTC)
    try:
        while not load.wait(_PROGRESS_S):
            failed = len(load.errors)
            succeeded = [response for response in load.responses if response.error is None]
            rate = sum(one.output_tokens for one in succeeded) / (datetime.now(UTC) - started).total_seconds()
            running = load.sent - len(load.responses)
            echo_note(
                f"{load.sent} of {requests} sent, {len(succeeded)} succeeded, {failed} failed, {running} running; "
                f"{rate:.1f} tokens/s"
            )
    except KeyboardInterrupt:
        load.abandon()
        return True
    return False


def _write_page(option: str, file: Path, text: str) -> None:
    from ops.report.page import write_page

    write_page(option, file, text)
    echo_note(f"{file}: written")


def _read_target(settings: Settings) -> Target:
    from schemas.speculator.checkpoint import CheckpointError
    from trainer.data.target import read_target

    try:
        return read_target(settings)
    except CheckpointError as error:
        raise UserError(str(error)) from error


def _parse_optional_time(text: str | None) -> datetime | None:
    return parse_time(text) if text else None
