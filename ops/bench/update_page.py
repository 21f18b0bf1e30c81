"""The frontier of ``aurora bench update`` as one HTML file. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import matplotlib as mpl

from ops.bench.harness import Report
from ops.bench.learning.variants import Order
from ops.bench.update import PolicyOutcome
from ops.report.canvas import MUTED, OTHERS, SERIES, figure_of, style, svg
from ops.report.demo_page import STYLE, figure_card, number

_TEMPLATE = Path(__file__).with_name("update.html")


def render_page(found: Mapping[Order, Sequence[PolicyOutcome]], report: Report) -> str:
    """The whole page."""
    figures = {figure.name: figure for figure in report.figures}
    headline = {
        "swap_pause": "ms for which the verify steps stand still at a swap",
        "fetch_cost": "ms of serving that reading and checking a version costs",
        **{
            f"{order}_auto_keeps": f"of the accepted tokens per step that auto keeps on {order} traffic"
            for order in found
        },
    }
    return Template(_TEMPLATE.read_text()).substitute(
        style=STYLE,
        subtitle=escape("{requests} recorded requests, {tokens} tokens".format_map(report.about["traffic"])),
        headline="".join(figure_card(number(figures[name].value), words) for name, words in headline.items()),
        sections="".join(_section(order, outcomes) for order, outcomes in found.items()),
        machine=escape("{processor}, {cores} cores.".format_map(report.machine)),
    )


def frontier(name: str, outcomes: Sequence[PolicyOutcome]) -> str:
    """Accepted tokens per step kept over swap overhead: fixed intervals as a line, ``auto`` beside it."""
    every, fixed, auto = outcomes[0], sorted(outcomes[:-1], key=lambda o: o.overhead), outcomes[-1]
    with mpl.rc_context(style(name)):
        figure, axes = figure_of(3.5)
        axes.plot([o.overhead * 100 for o in fixed], [o.accepted_share(every) * 100 for o in fixed], "o-", color=SERIES)
        axes.plot([auto.overhead * 100], [auto.accepted_share(every) * 100], "D", color=OTHERS[0], markersize=9)
        for outcome in outcomes:
            place = (outcome.overhead * 100, outcome.accepted_share(every) * 100)
            axes.annotate(outcome.name, place, (6, -12), textcoords="offset points", color=MUTED, fontsize=9)
        axes.set_xlabel("share of serving time spent on takeovers, %", color=MUTED)
        axes.set_ylabel("accepted tokens per step kept, %")
        axes.set_ylim(0, 105)
        return svg(figure)


def _section(order: Order, outcomes: Sequence[PolicyOutcome]) -> str:
    every = outcomes[0]
    rows = "".join(_row(outcome, every) for outcome in outcomes)
    head = "".join(
        f'<th class="number">{name}</th>'
        for name in ("takeovers", "overhead", "accepted tokens per step kept", "output")
    )
    table = (
        f'<div class="scroll"><table><thead><tr><th>policy</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
    title = "Domains mixed" if order == "mixed" else "One domain after the other"
    return f"<h2>{title}</h2>{frontier(order, outcomes)}{table}"


def _row(outcome: PolicyOutcome, every: PolicyOutcome) -> str:
    cells = (
        str(outcome.updates),
        f"{outcome.overhead:.3%}",
        f"{outcome.accepted_share(every):.1%}",
        f"{outcome.output_share(every):.1%}",
    )
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f"<tr><td>{escape(outcome.name)}</td>{numbers}</tr>"
