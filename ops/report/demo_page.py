"""The report as one HTML file. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ops.demo.record import ROLLING, Run, Version, faults, summary
from ops.report.charts import accepted_per_step_chart, loss_chart, throughput_chart
from schemas.settings import DAY_0

_TEMPLATE = Path(__file__).with_name("page.html")
STYLE = Path(__file__).with_name("page.css").read_text()
"""Of every page: its colours are the variables that the charts name."""


def page(run: Run) -> str:
    """The whole report."""
    figures = summary(run)
    return Template(_TEMPLATE.read_text()).substitute(
        style=STYLE,
        subtitle=escape(_subtitle(run, figures)),
        fault=f'<p class="fault">{escape("; ".join(faults(run)))}</p>' if faults(run) else "",
        headline="".join(figure_card(value, name) for value, name in _headline(figures)),
        rolling=ROLLING,
        accepted_per_step=accepted_per_step_chart(run),
        throughput=throughput_chart(run),
        loss=loss_chart(run),
        versions=version_rows(run),
        summary="".join(table_row(name, value) for name, value in _rows(figures)),
    )


def version_rows(run: Run) -> str:
    """Rows of the table of versions."""
    rows = "".join(_version_row(version, run.started) for version in run.versions)
    return rows or '<tr><td colspan="6">none was registered</td></tr>'


def figure_card(value: str, name: str) -> str:
    """A figure of the headline."""
    return f'<div class="figure"><b>{escape(value)}</b><span>{escape(name)}</span></div>'


def table_row(name: str, value: str) -> str:
    """A row of the table of figures."""
    return f'<tr><td>{escape(name)}</td><td class="number">{escape(value)}</td></tr>'


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash for what is not known."""
    return "-" if value is None else f"{value:.{digits}f}"


def _subtitle(run: Run, figures: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(run.started, UTC).strftime("%d %B %Y")
    domains = " then ".join(run.domains) or "no"
    drafted = next((version for request in run.requests for version in request.speculators), "")
    begin = "It started untrained. " if drafted.startswith(DAY_0) else ""
    return (
        f"{begin}{figures['requests']} requests with {domains} prompts, "
        f"{run.ended - run.started:.0f} seconds from start to end, {when}."
    )


def _headline(figures: dict[str, Any]) -> list[tuple[str, str]]:
    in_flight = sum(swap["in_flight"] > 0 for swap in figures["swaps"])
    first, last = figures["accepted_per_step_first_50"], figures["accepted_per_step_last_50"]
    plain = figures["tokens_per_s_no_speculation"]
    return [
        (
            f"{number(first)} → {number(last)}",
            f"accepted tokens per step, first and last {figures['edge_requests']} requests",
        ),
        (number(figures["tokens_per_s_last_50"], 0), f"tokens/s at the end, {number(plain, 0)} without speculation"),
        (str(in_flight), "versions swapped in while requests ran"),
        (f"{figures['failed_requests']} failed", f"of {figures['requests']} requests"),
        (
            f"{figures['lossless_mismatches']} differ",
            f"of {figures['lossless_tokens']:,} tokens decoded again by the target alone",
        ),
    ]


def _rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    edge = figures["edge_requests"]
    rows = [
        (f"accepted tokens per step of the first and last {edge} requests", _pair(figures, "accepted_per_step", 3)),
        (f"output tokens/s of the first and last {edge} requests", _pair(figures, "tokens_per_s", 1)),
        ("output tokens/s without speculation", number(figures["tokens_per_s_no_speculation"], 1)),
    ]
    rows += [
        (
            f"accepted tokens per step over the {name} prompts, then at its beginning and its end",
            f"{number(domain['accepted_per_step'], 3)}; {_pair(domain, 'accepted_per_step', 3)}",
        )
        for name, domain in figures["domains"].items()
    ]
    checked = f"{figures['lossless_checked']} requests, {figures['lossless_tokens']:,} tokens"
    verdict = f"{figures['lossless_mismatches']} mismatches, {figures['lossless_near_ties']} near ties"
    parts = f"{figures['rows_in_table']:,} in the table, {figures['rows_shed']:,} shed, {figures['rows_dead']:,} dead"
    return [
        *rows,
        ("decoded again by the target alone", f"{checked}: {verdict}"),
        ("rows published", f"{figures['rows_published']:,} = {parts}"),
        ("longest pause of a swap", _longest_pause(figures)),
    ]


def _longest_pause(figures: dict[str, Any]) -> str:
    pauses = [swap["pause_ms"] for swap in figures["swaps"]]
    return f"{max(pauses):.1f} ms" if pauses else "-"


def _pair(figures: dict[str, Any], name: str, digits: int) -> str:
    return f"{number(figures[f'{name}_first_50'], digits)} → {number(figures[f'{name}_last_50'], digits)}"


def _version_row(version: Version, start: float) -> str:
    times = [version.registered, version.promoted, version.served]
    cells = [_clock(None if time is None else time - start) for time in times]
    cells += [number(version.held_out), number(version.champion_held_out)]
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f"<tr><td>{escape(version.version)}</td>{numbers}</tr>"


def _clock(seconds: float | None) -> str:
    return "-" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
