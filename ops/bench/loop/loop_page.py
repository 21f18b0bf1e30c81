"""The page of ``aurora bench loop``."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from ops.bench.harness import Report
from ops.bench.loop.two_domain_run import LoopRecord
from ops.demo.record import ROLLING
from ops.report.charts import acceptance_chart, loss_chart
from ops.report.demo_page import VERSION_COLUMNS, version_rows
from ops.report.page import format_number, render_page

_HEADLINE = {
    "day0_speedup": "times the speed of no speculation, after the first domain",
    "shift_speedup": "times the speed of the champion at the shift, after the second domain",
    "trace_to_served_p50_s": "seconds from a verify step to a version that was trained on it, median",
}


def render_loop_page(record: LoopRecord, report: Report) -> str:
    """Return the page of a run."""
    run, figures = record.run, {figure.name: figure for figure in report.figures}
    date = datetime.fromtimestamp(run.started, UTC).strftime("%d %B %Y")
    requests = f"{len(run.requests)} requests with {' then '.join(record.domains)} prompts"
    return render_page(
        Path(__file__).with_name("loop.html"),
        subtitle=f"{requests}, {run.ended - run.started:.0f} seconds from start to end, {date}.",
        headline_figures=[(format_number(figures[name].value), text) for name, text in _HEADLINE.items()],
        rolling=ROLLING,
        acceptance_length=acceptance_chart(run),
        loss=loss_chart(run),
        version_columns=VERSION_COLUMNS,
        versions=version_rows(run),
        figures=[figure.cells for figure in report.figures],
        machine=f"{report.machine['processor']}, {report.machine['cores']} cores, code {report.code}.",
    )
