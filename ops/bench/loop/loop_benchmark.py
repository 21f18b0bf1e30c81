"""The run of ``aurora bench loop``: its options, its own stack, its figures, and its page.

Broker, node, stream, tables, trainer, registry and promoter run as processes of their own, as in ``aurora up``. The
traffic has one domain, then another. After each domain the trainer is stopped, and held-out prompts are run in turn
with the newest champion, without speculation, and after the shift with the version that was champion at the shift: the
value of a draft that was trained once.

With an imported draft, which was trained on the first domain, only the second one is learned: the figures show what a
draft that a fleet already has gains from learning on.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from ops.bench import prompts
from ops.bench.embedded_kafka import free_port
from ops.bench.harness import Figure, Goal, Report, Say, Session, compare_arms, percentile
from ops.bench.loop.imported_draft import find_draft
from ops.bench.loop.learning_delay import Delays
from ops.bench.loop.node_comparison import ComparisonResult
from ops.bench.loop.two_domain_run import ADAPTIVE, NONE, STATIC, YOUNG_S, LoopRecord, LoopSize, TwoDomainRun
from ops.demo.record import ROLLING, DemoRun, accepted_per_step, last_rate, split_edges, summarize_run
from ops.demo.run import wipe_data
from ops.loadgen.load import Response
from ops.local.stack import running_stack
from ops.report.charts import acceptance_chart, loss_chart
from ops.report.demo_page import VERSION_COLUMNS, version_rows
from ops.report.page import format_number, render_page, write_page
from schemas.errors import UserError
from schemas.settings import Kafka, Registry, Settings

MIN_MINUTES = 0.5
_LOOPBACK = "127.0.0.1"
DAY_0_GOALS = {"math": Goal(1.8, at_least=True), "code": Goal(1.6, at_least=True)}
DAY_0_GOAL = Goal(1.5, at_least=True)
"""Of the other domains, and of every domain with the concurrency of the traffic."""
SHIFT_GOAL, SHIFT_OVER_NONE_LOADED_GOAL = Goal(1.25, at_least=True), Goal(1.4, at_least=True)
DELAY_GOAL = Goal(60, at_least=False)
_HEADLINE = {
    "day0_speedup": "times the speed of no speculation, after the first domain",
    "shift_speedup": "times the speed of the champion at the shift, after the second domain",
    "imported_speedup": "times the speed of no speculation: the imported draft, on the first domain",
    "import_shift_speedup": "times the speed of the imported draft itself, after the second domain",
    "trace_to_served_p50_s": "seconds from a verify step to a version that was trained on it, median",
}
"""Of the figures that a run has."""


def run(
    settings: Settings,
    say: Say,
    *,
    domains: str,
    size: LoopSize,
    fresh: bool,
    html: Path | None,
    imported: str | None = None,
) -> Report:
    """Run the loop, and stop all of it."""
    pair = parse_domains(domains)
    draft = None if imported is None else find_draft(settings, imported)
    if html:
        write_page("--html", html, "")
    session, here = Session(settings.serve.num_threads), own_settings(settings)
    with running_stack(here, say, restart=False) as stack:
        if fresh:
            wipe_data(here)
        record = TwoDomainRun(stack, pair, size, say, draft).run()
    about = {
        "domains": pair,
        "imported": imported,
        **asdict(size),
        **summarize(record),
        "logs": f"{here.stack.data_dir}/logs",
    }
    report = session.report(f"the loop through {' and '.join(pair)} prompts", about, judge(record))
    if html:
        write_page("--html", html, render_loop_page(record, report))
    return report


def loop_size(*, quick: bool, minutes: str | None, concurrency: int, max_tokens: int) -> LoopSize:
    """Return the size that the flags name. Raises ``UserError`` for wrong ``minutes``."""
    default = "2" if quick else "10"
    each = parse_minutes(default if minutes is None else minutes)
    if quick:
        return LoopSize(each, concurrency, max_tokens, alone=4, loaded=3, training=3)
    return LoopSize(each, concurrency, max_tokens, alone=12, loaded=6, training=6)


def parse_domains(text: str) -> tuple[str, str]:
    """Return the two domains that a flag names."""
    match [name.strip() for name in text.split(",")]:
        case [first, second] if first != second and {first, second} <= set(prompts.ALL_DOMAINS):
            return first, second
    raise UserError(f"--domains {text}: name two of {', '.join(prompts.ALL_DOMAINS)}, as in code,math")


def parse_minutes(text: str) -> tuple[float, float]:
    """Return the minutes of learning in each domain: one number for both, or one for each."""
    try:
        minutes = [float(part) for part in text.split(",")]
    except ValueError:
        minutes = []
    if len(minutes) in {1, 2} and all(MIN_MINUTES <= each < inf for each in minutes):
        return minutes[0], minutes[-1]
    raise UserError(f"--minutes {text}: give {MIN_MINUTES:g} or more, for both domains or as in 30,10 for each")


def own_settings(settings: Settings) -> Settings:
    """Return the settings with folders, ports and services of this benchmark; how to learn and serve stays."""
    folder = Path(settings.stack.data_dir) / "bench" / "loop"
    ports = {f"{name}_port": free_port() for name in ("kafka", "kafka_controller", "mlflow")}
    changed: dict[str, dict[str, object]] = {
        "kafka": {"bootstrap_servers": Kafka().bootstrap_servers, "client_options": {}},
        "tables": {"uri": str(folder / "tables"), "storage_options": {}},
        "serve": {
            "host": _LOOPBACK,
            "port": free_port(),
            "api_keys_file": "",
            "admin_port": 0,
            "admin_token": SecretStr(secrets.token_urlsafe()),
        },
        "traces": {"claim_check_uri": str(folder / "claims"), "claim_check_options": {}},
        "stream": {"host": _LOOPBACK, "port": free_port(), "data_dir": str(folder / "stream")},
        "train": {
            "host": _LOOPBACK,
            "port": free_port(),
            "checkpoint_dir": str(folder / "train"),
            "self_generation": 0.0,  # the figures state what traffic teaches
        },
        "promoter": {"host": _LOOPBACK, "port": free_port()},
        "stack": {"data_dir": str(folder), **ports},
        "registry": {"tracking_uri": Registry().tracking_uri},
    }
    sections = {name: getattr(settings, name).model_copy(update=values) for name, values in changed.items()}
    return settings.model_copy(update=sections)


def figure_names(domains: Sequence[str], *, imported: bool = False) -> list[str]:
    """Return the names of all figures of a run through these domains."""
    prefix = "import_" if imported else ""
    return [
        *(["imported_speedup"] if imported else ["day0_speedup"]),
        *(["imported_speedup_loaded"] if imported else ["day0_speedup_loaded", "day0_speedup_while_training"]),
        *(f"{prefix}{name}{suffix}" for name in ("shift_speedup", "shift_over_none") for suffix in ("", "_loaded")),
        *(f"trace_to_served_{share}_s" for share in ("p50", "p99")),
        *(f"accepted_per_step_{domain}" for domain in (domains[1:] if imported else domains)),
        *("versions_served", "failed_requests"),
    ]


def judge(record: LoopRecord) -> tuple[Figure, ...]:
    """Return the figures with their goals."""
    # Without a newer champion there is no static arm: the static draft is the adaptive one.
    static = STATIC if all(STATIC in result.rates for result in record.second) else ADAPTIVE
    run, errors = record.run, [request.error for request in record.run.failed]
    prefix, over_none_loaded = ("import_", None) if record.training is None else ("", SHIFT_OVER_NONE_LOADED_GOAL)
    if record.training is None:
        first = _speedups("imported_speedup", record.first, NONE, (None, None))
    else:
        first = _day_0_speedups(record.first, record.training, record.domains[0])
    return (
        *first,
        *_speedups(f"{prefix}shift_speedup", record.second, static, (SHIFT_GOAL, None), at_shift=record.at_shift),
        *_speedups(f"{prefix}shift_over_none", record.second, NONE, (None, over_none_loaded)),
        *_delay_figures(record.delays),
        *(_acceptance(run, domain) for domain in record.learned),
        Figure("versions_served", len({swap.version for swap in run.swaps}), detail={"registered": len(run.versions)}),
        Figure("failed_requests", len(errors), goal=Goal(0, at_least=False), detail={"errors": errors[:5]}),
    )


def summarize(record: LoopRecord) -> dict[str, Any]:
    """Return the rest of the JSON: the traffic of each domain, and the versions with their times."""
    start, demo = record.run.started, summarize_run(record.run)
    return {
        "traffic": demo["domains"],
        "with_trainer_running_tokens_per_s": {
            domain: _rounded(last_rate(_of_domain(record.run, domain).succeeded)) for domain in record.learned
        },
        "at_shift": record.at_shift,
        "swaps": demo["swaps"],
        "versions": [
            {
                "version": version.version,
                "registered_s": _rounded(version.registered - start),
                "served_s": None if version.served is None else _rounded(version.served - start),
                "held_out": _rounded(version.held_out),
                "champion_held_out": _rounded(version.champion_held_out),
            }
            for version in record.run.versions
        ],
        "seconds": demo["duration_s"],
    }


def _day_0_speedups(first: Sequence[ComparisonResult], training: ComparisonResult, domain: str) -> Iterator[Figure]:
    yield from _speedups("day0_speedup", first, NONE, (DAY_0_GOALS.get(domain, DAY_0_GOAL), DAY_0_GOAL))
    yield _speedup("day0_speedup_while_training", training, NONE)


def _speedups(
    name: str,
    results: Sequence[ComparisonResult],
    under: str,
    goals: tuple[Goal | None, Goal | None],
    **detail: str | None,
) -> Iterator[Figure]:
    """Yield the figure for one request at a time and that for the concurrency of the traffic, each with its goal."""
    for suffix, result, goal in zip(("", "_loaded"), results, goals, strict=False):
        yield _speedup(f"{name}{suffix}", result, under, goal, **detail)


def _speedup(name: str, result: ComparisonResult, under: str, goal: Goal | None = None, **detail: str | None) -> Figure:
    arms = (ADAPTIVE, under)
    compared = {
        "at_once": result.concurrency,
        "accepted_per_step": {arm: _rounded(result.accepted_per_step[arm]) for arm in arms},
        "versions": {arm: list(result.versions[arm]) for arm in arms},
        "same_answers": round(result.same_answers, 3),
    }
    return compare_arms(name, result.rates, ADAPTIVE, under, goal=goal, detail={**compared, **detail})


def _delay_figures(delays: Delays) -> Iterator[Figure]:
    detail = {
        "rows": len(delays.seconds),
        "unserved": delays.unserved,
        f"of_the_last_{YOUNG_S:.0f}_s": delays.young,
    }
    for name, share, goal in (("p50", 0.5, DELAY_GOAL), ("p99", 0.99, None)):
        seconds = percentile(delays.seconds, share) if delays.seconds else None
        yield Figure(f"trace_to_served_{name}_s", seconds, "s", goal, detail=detail)


def _acceptance(run: DemoRun, domain: str) -> Figure:
    """Return the accepted tokens per step of the live traffic at the end of a domain, with those at its start."""
    answered = _of_domain(run, domain).succeeded
    first, last = split_edges(answered)
    detail = {
        "first": _rounded(accepted_per_step(first)),
        "requests": len(last),
        "asked_before": find_repeated(answered)[len(answered) - len(last) :].count(True),
    }
    return Figure(f"accepted_per_step_{domain}", accepted_per_step(last), detail=detail)


def find_repeated(requests: Sequence[Response]) -> list[bool]:
    """Return for each request whether an earlier one had the same prompt, so that its output was trained on."""
    first = {request.prompt: number for number, request in reversed(list(enumerate(requests)))}
    return [first[request.prompt] < number for number, request in enumerate(requests)]


def _of_domain(run: DemoRun, domain: str) -> DemoRun:
    return replace(run, requests=tuple(request for request in run.requests if request.domain == domain))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def render_loop_page(record: LoopRecord, report: Report) -> str:
    """Return the page of a run."""
    run, figures = record.run, {figure.name: figure for figure in report.figures}
    date = datetime.fromtimestamp(run.started, UTC).strftime("%d %B %Y")
    requests = f"{len(run.requests)} requests with {' then '.join(record.learned)} prompts"
    return render_page(
        Path(__file__).with_name("loop.html"),
        subtitle=f"{requests}, {run.ended - run.started:.0f} seconds from start to end, {date}.",
        headline_figures=[
            (format_number(figures[name].value), text) for name, text in _HEADLINE.items() if name in figures
        ],
        rolling=ROLLING,
        acceptance_length=acceptance_chart(run),
        loss=loss_chart(run),
        version_columns=VERSION_COLUMNS,
        versions=version_rows(run),
        figures=[figure.cells for figure in report.figures],
        machine=f"{report.machine['processor']}, {report.machine['cores']} cores, code {report.code}.",
    )
