"""Report page of ``aurora bench update``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from ops.bench.harness import Report
from ops.bench.learning.variants import Order
from ops.bench.update import PolicyOutcome
from ops.report import page
from ops.report.page import format_number
from ops.report.theme import MUTED, OTHERS, SERIES, chart_style, new_figure, render_svg

_TEMPLATE = Path(__file__).with_name("update.html")


def render_page(found: Mapping[Order, Sequence[PolicyOutcome]], report: Report) -> str:
    """Return the page."""
    figures = {figure.name: figure for figure in report.figures}
    headline = {
        "swap_pause": "ms for which the verify steps stand still at a swap",
        "fetch_cost": "ms of serving that reading and checking a version costs",
        **{
            f"{order}_auto_keeps": f"of the accepted tokens per step that auto keeps on {order} traffic"
            for order in found
        },
    }
    return page.render_page(
        _TEMPLATE,
        subtitle="{requests} recorded requests, {tokens} tokens".format_map(report.about["traffic"]),
        headline_figures=[(format_number(figures[name].value), words) for name, words in headline.items()],
        sections=[_section(order, outcomes) for order, outcomes in found.items()],
        machine="{processor}, {cores} cores.".format_map(report.machine),
    )


def frontier(name: str, outcomes: Sequence[PolicyOutcome]) -> str:
    """Accepted tokens per step kept over swap overhead: fixed intervals as a line, ``auto`` beside it."""
    every, fixed, auto = outcomes[0], sorted(outcomes[:-1], key=lambda o: o.overhead), outcomes[-1]
    with mpl.rc_context(chart_style(name)):
        figure, axes = new_figure(3.5)
        axes.plot([o.overhead * 100 for o in fixed], [o.accepted_share(every) * 100 for o in fixed], "o-", color=SERIES)
        axes.plot([auto.overhead * 100], [auto.accepted_share(every) * 100], "D", color=OTHERS[0], markersize=9)
        for outcome in outcomes:
            place = (outcome.overhead * 100, outcome.accepted_share(every) * 100)
            axes.annotate(outcome.name, place, (6, -12), textcoords="offset points", color=MUTED, fontsize=9)
        axes.set_xlabel("share of serving time spent on takeovers, %", color=MUTED)
        axes.set_ylabel("accepted tokens per step kept, %")
        axes.set_ylim(0, 105)
        return render_svg(figure)


def _section(order: Order, outcomes: Sequence[PolicyOutcome]) -> dict[str, object]:
    every = outcomes[0]
    rows = [
        (
            outcome.name,
            str(outcome.updates),
            f"{outcome.overhead:.3%}",
            f"{outcome.accepted_share(every):.1%}",
            f"{outcome.output_share(every):.1%}",
        )
        for outcome in outcomes
    ]
    title = "Domains mixed" if order == "mixed" else "One domain after the other"
    return {"title": title, "chart": frontier(order, outcomes), "rows": rows}
