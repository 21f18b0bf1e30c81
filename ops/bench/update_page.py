"""The page of ``aurora bench update``: the frontier between accepted tokens and the cost of updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from ops.bench.harness import Report
from ops.bench.learning.variants import Order
from ops.bench.update import PolicyOutcome
from ops.report.page import format_number, render_page
from ops.report.theme import MUTED, OTHERS, SERIES, chart_style, new_figure, render_svg

_TITLES: Mapping[Order, str] = {"mixed": "Domains mixed", "ordered": "One domain after the other"}


def render_update_page(outcomes: Mapping[Order, Sequence[PolicyOutcome]], report: Report) -> str:
    """Return the page of a run."""
    figures = {figure.name: figure for figure in report.figures}
    headline = {
        "swap_pause": "ms for which the verify steps pause at a swap",
        "fetch_cost": "ms of serving that reading and checking a version costs",
        **{f"{order}_auto_keeps": f"of the accepted tokens that auto keeps on {order} traffic" for order in outcomes},
    }
    return render_page(
        Path(__file__).with_name("update.html"),
        subtitle="{requests} recorded requests, {tokens} tokens".format_map(report.about["traffic"]),
        headline_figures=[(format_number(figures[name].value), text) for name, text in headline.items()],
        sections=[
            {"title": _TITLES[order], "chart": frontier_chart(order, found), "rows": _rows(found)}
            for order, found in outcomes.items()
        ],
        machine="{processor}, {cores} cores.".format_map(report.machine),
    )


def frontier_chart(name: str, outcomes: Sequence[PolicyOutcome]) -> str:
    """Draw the accepted tokens over the overhead: fixed intervals as a line, ``auto`` as a diamond."""
    every, fixed, auto = outcomes[0], sorted(outcomes[:-1], key=lambda o: o.overhead), outcomes[-1]
    with mpl.rc_context(chart_style(name)):
        figure, axes = new_figure(3.5)
        shares = [o.accepted_share(every) * 100 for o in fixed]
        axes.plot([o.overhead * 100 for o in fixed], shares, "o-", color=SERIES)
        axes.plot([auto.overhead * 100], [auto.accepted_share(every) * 100], "D", color=OTHERS[0], markersize=9)
        for outcome in outcomes:
            place = (outcome.overhead * 100, outcome.accepted_share(every) * 100)
            axes.annotate(outcome.name, place, (6, -12), textcoords="offset points", color=MUTED, fontsize=9)
        axes.set_xlabel("share of serving time spent on updates, %", color=MUTED)
        axes.set_ylabel("accepted tokens kept, %")
        axes.set_ylim(0, 105)
        return render_svg(figure)


def _rows(outcomes: Sequence[PolicyOutcome]) -> list[tuple[str, ...]]:
    every = outcomes[0]
    return [
        (o.name, str(o.updates), f"{o.overhead:.3%}", f"{o.accepted_share(every):.1%}", f"{o.output_share(every):.1%}")
        for o in outcomes
    ]
