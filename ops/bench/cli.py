"""``aurora bench``: measure the parts and the whole loop on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ops.cli.terminal import AsJson, Config, Set, echo, echo_json, echo_note, load_settings, user_errors
from schemas.errors import UserError
from schemas.settings import Settings
from schemas.telemetry import logs

app = typer.Typer(no_args_is_help=True, help="Measure the parts and the whole loop on this machine.")

Only = Annotated[
    list[str] | None, typer.Option("--only", metavar="NAME", help="Figures whose names begin with NAME; repeatable.")
]
Speculator = Annotated[str, typer.Option("--speculator", help="Trained speculator: name in the cache, or folder.")]
_DOMAINS = "math|code|sql|chat|edits|tools"


@contextmanager
def _benchmark(config: Path | None, set_: list[str] | None) -> Iterator[Settings]:
    """Load the settings and limit the logs to warnings; report user errors in one line."""
    with user_errors():
        logs.configure("bench", "warning")
        yield load_settings(config, set_)


@app.command()
def speculator(  # noqa: PLR0913, PLR0917 - one for each flag
    config: Config = None,
    set_: Set = None,
    domain: Annotated[str, typer.Option(metavar=_DOMAINS, help="Domain of the prompts to train on.")] = "math",
    name: Annotated[str | None, typer.Option(help="Name in the cache; the domain by default.")] = None,
    requests: Annotated[int, typer.Option(min=25, help="Requests to record.")] = 400,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest recorded output, in tokens.")] = 96,
    minutes: Annotated[float, typer.Option(min=0.1, help="Training time, after the recording.")] = 12,
    steps: Annotated[int, typer.Option(min=1, max=16, help="Steps of the training-time test.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Train a speculator on recorded traces of one domain, for the other benchmarks."""
    with _benchmark(config, set_) as settings:
        from ops.bench import speculator as training

        options = training.SpeculatorOptions(name or domain, domain, requests, max_tokens, minutes, steps)
        trained = training.run(settings, options, echo_note if as_json else echo)
        if as_json:
            echo_json(asdict(trained))
        else:
            accepted = f"{trained.accepted_per_step:.2f} of {trained.lookahead} draft tokens accepted per step"
            echo(f"{trained.folder}: {accepted}")


@app.command()
def serving(
    config: Config = None,
    set_: Set = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run fewer and shorter trials: ten to fifteen minutes.")
    ] = False,
    only: Only = None,
    speculator: Speculator = "math",
    domain: Annotated[str, typer.Option(metavar=_DOMAINS, help="Domain that the speculator was trained for.")] = "math",
    as_json: AsJson = False,
) -> None:
    """Compare the serving node with other engines on the same weights, and measure speculation and its overheads."""
    with _benchmark(config, set_) as settings:
        from ops.bench.serving.serving_benchmark import run

        report = run(
            settings, echo_note, quick=quick, only=tuple(only or ()), trained_speculator=speculator, domain=domain
        )
        report.print(as_json=as_json)


@app.command()
def soak(
    config: Config = None,
    set_: Set = None,
    minutes: Annotated[float, typer.Option(min=0.5, help="Length of the soak.")] = 30,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests.")] = 16,
    swap_every: Annotated[float, typer.Option(min=1, help="Seconds between two versions.")] = 10,
    leaving: Annotated[float, typer.Option(min=0, max=1, help="Share of clients that disconnect early.")] = 0.1,
    speculator: Speculator = "math",
    as_json: AsJson = False,
) -> None:
    """Load a node for a long time, with swaps, disconnecting clients and broker outages; exit 1 if a goal is missed."""
    with _benchmark(config, set_) as settings:
        from ops.bench.soak import SoakOptions, run

        report = run(settings, SoakOptions(minutes, concurrency, swap_every, leaving, speculator), echo_note)
        report.print(as_json=as_json)
        raise typer.Exit(0 if report.passed else 1)


@app.command()
def stream(
    config: Config = None,
    set_: Set = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run fewer trials of less data: below three minutes.")] = False,
    only: Only = None,
    as_json: AsJson = False,
) -> None:
    """Measure the stream worker from topic to committed tables, beside bare loops over the same records."""
    with _benchmark(config, set_) as settings:
        from ops.bench.stream.stream_benchmark import run

        run(settings, echo_note, quick=quick, only=tuple(only or ())).print(as_json=as_json)


@app.command()
def loop(  # noqa: PLR0913, PLR0917 - one for each flag
    config: Config = None,
    set_: Set = None,
    domains: Annotated[
        str,
        typer.Option(
            metavar="ONE,OTHER", help="Two of code, math, sql, chat, edits, tools, in the order of the traffic."
        ),
    ] = "code,math",
    minutes: Annotated[
        str | None,
        typer.Option(metavar="EACH|ONE,OTHER", help="Minutes of learning in the domains; 10 by default."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Learn for two minutes in each domain, and run fewer trials.")
    ] = False,
    concurrency: Annotated[int, typer.Option(min=1, help="Concurrent requests of the traffic.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longest output, in tokens.")] = 128,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the data of earlier runs of this benchmark.")] = False,
    import_: Annotated[
        str | None,
        typer.Option(
            "--import",
            metavar="NAME",
            help="Begin with this draft of `aurora bench speculator`, trained on the first domain; learn the second.",
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with curves and figures.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run the whole loop through two domains of traffic: what it gains, and how soon."""
    with _benchmark(config, set_) as settings:
        from ops.bench.loop.loop_benchmark import loop_size, run

        size = loop_size(quick=quick, minutes=minutes, concurrency=concurrency, max_tokens=max_tokens)
        report = run(settings, echo_note, domains=domains, size=size, fresh=fresh, html=html, imported=import_)
        report.print(as_json=as_json)


@app.command()
def learning(  # noqa: PLR0913, PLR0917 - one for each flag
    config: Config = None,
    set_: Set = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run three variants, two seeds, 12,000 tokens.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Variants whose names begin with NAME; repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trials of each variant.")] = 3,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the recorded traffic; all by default.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Parallel trials.")] = 1,
    record: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Record N requests of each domain where missing, and end.")
    ] = None,
    long_requests: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Serve and score N requests of 1,000 to 4,000 tokens, and end."),
    ] = None,
    sampled: Annotated[
        bool,
        typer.Option(
            "--sampled",
            help="Record or replay requests at temperature 0.8 that are drafted with trees, in recorded order.",
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with curves and tables.")] = None,
    as_json: AsJson = False,
) -> None:
    """Replay recorded traffic offline: how fast a speculator learns from it, and what helps."""
    with _benchmark(config, set_) as settings:
        from ops.bench.learning import recorded_traffic, study

        if record is not None:
            kind = recorded_traffic.SAMPLED if sampled else recorded_traffic.GREEDY
            recorded_traffic.record_traffic(settings, record, echo_note, kind)
            return
        if long_requests is not None:
            if sampled:
                raise UserError("--long-requests: they are greedy; leave out --sampled")
            study.run_long_requests(settings, echo_note, long_requests).print(as_json=as_json)
            return
        result = study.run(
            settings,
            echo_note,
            quick=quick,
            only=tuple(only or ()),
            seeds=seeds,
            tokens=tokens,
            processes=processes,
            sampled=sampled,
        )
        if html is not None:
            from ops.bench.learning.learning_page import render_learning_page
            from ops.report.page import write_page

            write_page("--html", html, render_learning_page(result))
            echo_note(f"{html}: written")
        result.report().print(as_json=as_json)


@app.command()
def trainer(
    config: Config = None,
    set_: Set = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run fewer and shorter trials: below three minutes.")] = False,
    only: Only = None,
    peers: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Environment of the public trainers, as `make trainer-peers` builds it."),
    ] = Path(".venv-peers"),
    as_json: AsJson = False,
) -> None:
    """Compare training steps with public trainers of the same draft, and measure training on whole draft trees."""
    with _benchmark(config, set_) as settings:
        from ops.bench.trainer.trainer_benchmark import run

        run(settings, echo_note, quick=quick, only=tuple(only or ()), peers=peers).print(as_json=as_json)


@app.command()
def promotion(
    config: Config = None,
    set_: Set = None,
    runs: Annotated[int, typer.Option(min=20, help="Simulated canaries of each kind.")] = 500,
    quick: Annotated[bool, typer.Option("--quick", help="60 canaries of each kind: below two minutes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Simulate canary analyses: how often they decide wrongly, and how much traffic they need to decide rightly."""
    with _benchmark(config, set_) as settings:
        from ops.bench.promotion import QUICK_RUNS, run

        run(settings, QUICK_RUNS if quick else runs, echo_note).print(as_json=as_json)


@app.command()
def update(
    config: Config = None,
    set_: Set = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less traffic, fewer versions: below three minutes.")] = False,
    tokens: Annotated[
        int | None,
        typer.Option(min=1000, help="Tokens of the recorded traffic; 50,000 by default, 8,000 with --quick."),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with the frontier.")] = None,
    as_json: AsJson = False,
) -> None:
    """Sweep how often a node updates to newer versions: the acceptance that it loses, and the cost of the swaps."""
    with _benchmark(config, set_) as settings:
        from ops.bench.update import run

        run(settings, echo_note, quick=quick, tokens=tokens, html=html).print(as_json=as_json)
