"""Report page of ``aurora bench loop``."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from ops.bench.harness import Figure, Report
from ops.bench.loop_course import Record
from ops.demo.record import ROLLING
from ops.report.charts import acceptance_chart, loss_chart
from ops.report.demo_page import VERSION_COLUMNS, version_rows
from ops.report.page import format_number, render_page

_TEMPLATE = Path(__file__).with_name("loop.html")
_HEADLINE = {
    "day0_speedup": "times the speed of no speculation, after the first domain",
    "shift_speedup": "times the speed of the version from before the shift, after the second",
    "trace_to_served_p50_s": "seconds from a verify step to the version that learned from it, median",
}


def page(record: Record, report: Report) -> str:
    """Return the page."""
    run, known = record.run, {figure.name: figure for figure in report.figures}
    when = datetime.fromtimestamp(run.started, UTC).strftime("%d %B %Y")
    requests = f"{len(run.requests)} requests with {' then '.join(record.domains)} prompts"
    return render_page(
        _TEMPLATE,
        subtitle=f"{requests}, {run.ended - run.started:.0f} seconds from start to end, {when}.",
        headline_figures=[(format_number(known[name].value), words) for name, words in _HEADLINE.items()],
        rolling=ROLLING,
        acceptance_length=acceptance_chart(run),
        loss=loss_chart(run),
        version_columns=VERSION_COLUMNS,
        versions=version_rows(run),
        figures=map(_cells, report.figures),
        machine=f"{report.machine['processor']}, {report.machine['cores']} cores, code {report.code}.",
    )


def _cells(figure: Figure) -> list[str]:
    spread = figure.ratios and f"{min(figure.ratios.values):.2f} .. {max(figure.ratios.values):.2f}"
    outcome = {True: "met", False: "missed", None: ""}[figure.met]
    value = f"{format_number(figure.value, 3)} {figure.unit}".strip()
    return [figure.name, value, spread or "", str(figure.goal or ""), outcome]
