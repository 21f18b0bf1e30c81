"""Report page of a demo run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ops.demo.comparison import describe_speedup, measure_speedup
from ops.demo.record import ROLLING, DemoRun, find_faults, summarize_run
from ops.report.charts import acceptance_chart, loss_chart, throughput_chart
from ops.report.page import TEMPLATES, format_number, render_page
from schemas.settings import DAY_0

VERSION_COLUMNS = (
    "version",
    "registered",
    "promoted",
    "served",
    "held-out acceptance length",
    "champion's",
)


def render_demo_page(run: DemoRun) -> str:
    """Return the report."""
    figures = summarize_run(run)
    return render_page(
        TEMPLATES / "demo.html",
        subtitle=_subtitle(run, figures),
        faults=find_faults(run),
        slowdown=(figures["measured"] or {}).get("slowdown"),
        figures=_headline(run, figures),
        rolling=ROLLING,
        acceptance_length=acceptance_chart(run),
        throughput=throughput_chart(run),
        loss=loss_chart(run),
        version_columns=VERSION_COLUMNS,
        versions=version_rows(run),
        rows=_figure_rows(figures),
    )


def version_rows(run: DemoRun) -> list[list[str]]:
    """Return the cells of the version table, one row for each version."""
    rows = []
    for version in run.versions:
        times = (version.registered, version.promoted, version.served)
        clocks = ["-" if at is None else _clock(at - run.started) for at in times]
        lengths = [None if value is None else 1 + value for value in (version.held_out, version.champion_held_out)]
        rows.append([version.version, *clocks, *map(format_number, lengths)])
    return rows


def _subtitle(run: DemoRun, figures: dict[str, Any]) -> str:
    date = datetime.fromtimestamp(run.started, UTC).strftime("%d %B %Y")
    domains = " then ".join(run.domains) or "no"
    versions = {version for request in run.requests for version in request.speculators}
    untrained = "It started untrained. " if any(version.startswith(DAY_0) for version in versions) else ""
    return (
        f"{untrained}{figures['requests']} requests with {domains} prompts, "
        f"{run.ended - run.started:.0f} seconds from start to end, {date}."
    )


def _headline(run: DemoRun, figures: dict[str, Any]) -> list[tuple[str, str]]:
    speedup = measure_speedup(run.measured)
    in_flight = sum(swap["in_flight"] > 0 for swap in figures["swaps"])
    return [
        (
            describe_speedup(speedup).removesuffix(" tokens/s").replace("->", "→") if speedup else "-",
            "tokens/s without and with speculation, measured at the end",
        ),
        (
            f"{format_number(figures['first_50_ratio'])}x",
            f"with speculation in the first {figures['first_50_requests']} requests, beside the trainer",
        ),
        (
            _pair(figures, "acceptance_length", 2),
            f"acceptance length, first and last {figures['edge_requests']} requests",
        ),
        (str(in_flight), "versions swapped in while requests ran"),
        (f"{figures['failed_requests']} failed", f"of {figures['requests']} requests"),
        (
            f"{figures['lossless_mismatches']} differ",
            f"of {figures['lossless_tokens']:,} tokens decoded again with the target alone",
        ),
    ]


def _figure_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    edge = figures["edge_requests"]
    domains = [
        (
            f"acceptance length over the {name} prompts, then of their first and last requests",
            f"{format_number(domain['acceptance_length'], 3)}; {_pair(domain, 'acceptance_length', 3)}",
        )
        for name, domain in figures["domains"].items()
    ]
    checked = f"{figures['lossless_checked']} requests, {figures['lossless_tokens']:,} tokens"
    verdict = f"{figures['lossless_mismatches']} mismatches, {figures['lossless_near_ties']} near ties"
    located = (
        f"{figures['rows_in_table']:,} in the table, {figures['rows_dropped']:,} dropped, {figures['rows_dead']:,} dead"
    )
    pauses = [swap["pause_ms"] for swap in figures["swaps"]]
    sources = [format_number(figures[f"{source}_accepted_per_step_last_50"]) for source in ("suffix", "speculator")]
    return [
        *_measured_rows(figures),
        (
            f"output tokens/s of the first {figures['first_50_requests']} requests without and with speculation",
            _rates(figures, "tokens_per_s_first_50"),
        ),
        (f"acceptance length of the first and last {edge} requests", _pair(figures, "acceptance_length", 3)),
        (f"output tokens/s of the last {edge} requests", format_number(figures["tokens_per_s_last_50"], 1)),
        (f"accepted per step in the last {edge} requests, suffix drafter and speculator", " + ".join(sources)),
        *domains,
        ("decoded again with the target alone", f"{checked}: {verdict}"),
        ("rows published", f"{figures['rows_published']:,} = {located}"),
        ("longest pause of a swap", f"{max(pauses):.1f} ms" if pauses else "-"),
    ]


def _measured_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    measured = figures["measured"]
    if measured is None:
        return [("measured speed-up", "-")]
    suffix, total = measured["suffix_accepted_per_step"], measured["accepted_per_step"]
    return [
        ("measured speed-up; each trial", f"{figures['measured_speedup']:.2f}; {_listed(measured['ratios'])}"),
        ("its median by the node's processor time", f"{measured['by_processor_time']:.2f}"),
        ("its output tokens/s without and with speculation", _rates(measured, "tokens_per_s")),
        (
            "its accepted tokens per step, suffix drafter and speculator",
            f"{suffix:.2f} + {total - suffix:.2f} of {measured['draft_tokens_per_step']:.2f} drafted",
        ),
        ("its verify step over one without a draft", f"{measured['relative_step_time']:.2f} times as long"),
        ("processors used by other programs during it", f"{measured['other_programs']:.0%}"),
    ]


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _rates(figures: dict[str, Any], name: str) -> str:
    plain, speculative = (format_number(figures[f"{name}{arm}"], 1) for arm in ("_no_speculation", ""))
    return f"{plain} → {speculative}"


def _pair(figures: dict[str, Any], name: str, digits: int) -> str:
    first, last = (format_number(figures[f"{name}_{edge}_50"], digits) for edge in ("first", "last"))
    return f"{first} → {last}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
