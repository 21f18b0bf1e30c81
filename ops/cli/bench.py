"""``aurora bench``: what the parts are worth on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ops.cli.terminal import AsJson, Config, Set, hint, say, settings_of, told

app = typer.Typer(no_args_is_help=True, help="Measure on this machine what the parts and the whole loop are worth.")


@app.command()
def speculator(  # noqa: PLR0913, PLR0917 - one for each flag
    config: Config = None,
    set_: Set = None,
    domain: Annotated[str, typer.Option(metavar="math|code|sql|chat", help="Prompts to learn from.")] = "math",
    name: Annotated[str | None, typer.Option(help="Name in the cache; the domain where none is given.")] = None,
    requests: Annotated[int, typer.Option(min=25, help="Requests to record.")] = 400,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest recorded answer, in tokens.")] = 96,
    minutes: Annotated[float, typer.Option(min=0.1, help="Training time, after the recording.")] = 12,
    steps: Annotated[int, typer.Option(min=1, max=16, help="Steps of the training-time test.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Train a speculator on recorded traces of one domain, for the other benchmarks."""
    with told():
        from dataclasses import asdict

        from ops.bench import speculator as trainer
        from schemas.telemetry import logs

        logs.configure("bench", "warning")
        plan = trainer.Plan(name or domain, domain, requests, max_tokens, minutes, steps)
        trained = trainer.run(settings_of(config, set_), plan, hint if as_json else say)
        if as_json:
            sys.stdout.write(json.dumps(asdict(trained), indent=2) + "\n")
        else:
            say(f"{trained.folder}: accepted tokens per step {trained.accepted_per_step:.2f} of {trained.lookahead}")


@app.command()
def serving(
    config: Config = None,
    set_: Set = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter trials: below three minutes.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Figures that begin with this; repeatable.")
    ] = None,
    speculator: Annotated[str, typer.Option(help="Trained speculator: name in the cache, or folder.")] = "math",
    domain: Annotated[
        str, typer.Option(metavar="math|code|sql|chat", help="The domain that it was trained for.")
    ] = "math",
    as_json: AsJson = False,
) -> None:
    """Measure the serving node beside others on the same weights: speed, what speculation brings, what it costs."""
    with told():
        from ops.bench import serving as figures
        from schemas.telemetry import logs

        logs.configure("bench", "warning")
        options = figures.Options(quick, tuple(only or ()), speculator, domain)
        report = figures.run(settings_of(config, set_), options, hint)
        report.print(as_json=as_json)


@app.command()
def soak(
    config: Config = None,
    set_: Set = None,
    minutes: Annotated[float, typer.Option(min=0.5, help="How long.")] = 30,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    swap_every: Annotated[float, typer.Option(min=1, help="Seconds between two versions.")] = 10,
    leaving: Annotated[float, typer.Option(min=0, max=1, help="Share of clients that hang up early.")] = 0.1,
    speculator: Annotated[str, typer.Option(help="Trained speculator: name in the cache, or folder.")] = "math",
    as_json: AsJson = False,
) -> None:
    """Load a node for a long time, through swaps, clients that leave and a broker that goes away; exit 1 on a miss."""
    with told():
        from ops.bench import soak as soaking
        from schemas.telemetry import logs

        logs.configure("bench", "warning")
        options = soaking.Options(minutes, concurrency, swap_every, leaving, speculator)
        report = soaking.run(settings_of(config, set_), options, hint)
        report.print(as_json=as_json)
        raise typer.Exit(0 if report.passed else 1)


@app.command()
def stream(
    config: Config = None,
    set_: Set = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer trials of less data: below three minutes.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Figures that begin with this; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the stream worker from topic to committed tables, beside bare loops over the same records."""
    with told():
        from ops.bench.stream import Options, run
        from schemas.telemetry import logs

        logs.configure("bench", "warning")
        report = run(settings_of(config, set_), Options(quick, tuple(only or ())), hint)
        report.print(as_json=as_json)


@app.command()
def loop(  # noqa: PLR0913, PLR0917 - one for each flag
    config: Config = None,
    set_: Set = None,
    domains: Annotated[
        str, typer.Option(metavar="ONE,OTHER", help="Two of code, math, sql, chat, in the order of the traffic.")
    ] = "code,math",
    minutes: Annotated[
        str | None,
        typer.Option(metavar="EACH|ONE,OTHER", help="Minutes of learning in the domains; 10 where none are given."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes in each domain, and fewer trials.")] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests of the traffic at a time.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest answer, in tokens.")] = 128,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what earlier runs of this benchmark left.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the picture of the run there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Drive the whole loop through two domains of traffic: what it gains, and how soon."""
    with told():
        from ops.bench.loop import Options, run
        from schemas.telemetry import logs

        logs.configure("bench", "warning")
        options = Options(domains, minutes, quick, concurrency, max_tokens, fresh, html)
        report = run(settings_of(config, set_), options, hint)
        report.print(as_json=as_json)


@app.command()
def learning(  # noqa: PLR0913, PLR0917 - one for each flag
    config: Config = None,
    set_: Set = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three variants, two seeds, 12,000 tokens.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Variants that begin with this; repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = 3,
    tokens: Annotated[int | None, typer.Option(min=1, help="Of the recorded traffic; all where not given.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    record: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Record N requests of each domain where missing, and end.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with curves and tables.")] = None,
    as_json: AsJson = False,
) -> None:
    """Replay recorded traffic offline: how fast a speculator learns from it, and what helps."""
    with told():
        from ops.bench.learning import study, traffic
        from schemas.telemetry import logs

        logs.configure("bench", "warning")
        settings = settings_of(config, set_)
        if record is not None:
            traffic.record(settings, record, hint)
            return
        options = study.Options(quick, tuple(only or ()), seeds, tokens, processes)
        found = study.run(settings, options, hint)
        if html is not None:
            from ops.bench.learning.page import page
            from ops.report.writing import write_page

            write_page("--html", html, page(found))
            hint(f"{html}: written")
        found.report().print(as_json=as_json)


@app.command()
def trainer(
    config: Config = None,
    set_: Set = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter trials: below three minutes.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Figures that begin with this; repeatable.")
    ] = None,
    peers: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Environment of the public trainers, as `make trainer-peers` builds it."),
    ] = Path(".venv-peers"),
    as_json: AsJson = False,
) -> None:
    """Measure training steps beside public trainers of the same draft, and what learning from whole trees brings."""
    with told():
        from ops.bench.trainer import Options, run
        from schemas.telemetry import logs

        logs.configure("bench", "warning")
        report = run(settings_of(config, set_), Options(quick, tuple(only or ()), peers), hint)
        report.print(as_json=as_json)


@app.command()
def promotion(
    config: Config = None,
    set_: Set = None,
    runs: Annotated[int, typer.Option(min=20, help="Simulated trials of each kind.")] = 500,
    quick: Annotated[bool, typer.Option("--quick", help="60 trials of each kind: below two minutes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Simulate trials of canaries: how often they are decided wrongly, and what traffic it takes to decide rightly."""
    with told():
        from ops.bench.promotion import QUICK, run
        from schemas.telemetry import logs

        logs.configure("bench", "warning")
        report = run(settings_of(config, set_), QUICK if quick else runs, hint)
        report.print(as_json=as_json)


@app.command()
def sync(
    config: Config = None,
    set_: Set = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less traffic, fewer versions: below three minutes.")] = False,
    tokens: Annotated[
        int | None, typer.Option(min=1000, help="Of the recorded traffic; 50,000 where not given, 8,000 with --quick.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with the frontier.")] = None,
    as_json: AsJson = False,
) -> None:
    """Sweep how often a node takes newer versions over: what adapts less, and what swaps cost."""
    with told():
        from ops.bench.sync import Options, run
        from schemas.telemetry import logs

        logs.configure("bench", "warning")
        report = run(settings_of(config, set_), Options(quick, tokens, html), hint)
        report.print(as_json=as_json)
