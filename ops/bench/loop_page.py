"""The picture of ``aurora bench loop`` as one HTML file. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape
from pathlib import Path
from string import Template

from ops import report as pages
from ops.bench.harness import Figure, Report
from ops.bench.loop_course import Record
from ops.demo.record import ROLLING
from ops.report.charts import accepted_per_step_chart, loss_chart
from ops.report.demo_page import STYLE, figure_card, number, version_rows

_TEMPLATE = Path(pages.__file__).with_name("loop.html")
_HEADLINE = {
    "day0_speedup": "times the speed of no speculation, after the first domain",
    "shift_speedup": "times the speed of the version from before the shift, after the second",
    "trace_to_served_p50_s": "seconds from a verify step to the version that learned from it, median",
}


def page(record: Record, report: Report) -> str:
    """The whole page."""
    run, known = record.run, {figure.name: figure for figure in report.figures}
    when = datetime.fromtimestamp(run.started, UTC).strftime("%d %B %Y")
    seconds = run.ended - run.started
    requests = f"{len(run.requests)} requests with {' then '.join(record.domains)} prompts"
    machine = f"{report.machine['processor']}, {report.machine['cores']} cores, code {report.code}."
    return Template(_TEMPLATE.read_text()).substitute(
        style=STYLE,
        subtitle=escape(f"{requests}, {seconds:.0f} seconds from start to end, {when}."),
        headline="".join(figure_card(number(known[name].value), words) for name, words in _HEADLINE.items()),
        rolling=ROLLING,
        accepted_per_step=accepted_per_step_chart(run),
        loss=loss_chart(run),
        versions=version_rows(run),
        figures="".join(map(_row, report.figures)),
        machine=escape(machine),
    )


def _row(figure: Figure) -> str:
    spread = figure.ratios and f"{min(figure.ratios.values):.2f} .. {max(figure.ratios.values):.2f}"
    outcome = {True: "met", False: "missed", None: ""}[figure.met]
    cells = [f"{number(figure.value, 3)} {figure.unit}".strip(), spread or "", str(figure.goal or ""), outcome]
    numbers = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
    return f"<tr><td>{escape(figure.name)}</td>{numbers}</tr>"
