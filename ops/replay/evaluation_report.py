"""Show the evaluation of drafters on past requests: as terminal tables and as a page."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib as mpl
from rich.table import Table

from ops.cli.terminal import new_table
from ops.report.page import TEMPLATES, render_page
from ops.report.theme import INK, MUTED, OTHERS, SERIES, chart_style, new_figure, render_svg
from trainer.replay.acceptance_figures import Interval
from trainer.replay.request_evaluation import ALL, RequestEvaluation

_COLORS = (SERIES, *OTHERS)
_ROW_IN = 0.32


def build_tables(evaluation: RequestEvaluation) -> list[Table]:
    """Return a table of all drafters by group, and one of the differences between several drafters."""
    table = new_table(
        "requests of",
        "drafter",
        right=("requests", "acceptance length", "95 %", "all positions", "acceptance by depth"),
    )
    for group in evaluation.groups:
        for i, drafter in enumerate(evaluation.drafters):
            figures = evaluation.figures(i, group)
            table.add_row(
                *(group if i == 0 else "", drafter.short, f"{figures.requests:,}"),
                *(f"{1 + figures.accepted_per_step.value:.3f}", _bounds(figures.accepted_per_step)),
                f"{1 + figures.all_positions:.3f}",
                " ".join(f"{share:.2f}" for share in figures.by_depth[: evaluation.lookahead]),
            )
    return [table, _build_differences_table(evaluation)] if len(evaluation.drafters) > 1 else [table]


def list_notes(evaluation: RequestEvaluation) -> Iterator[str]:
    """Yield the origin and the limits of the figures."""
    counts = evaluation.counts
    state = ", ".join(f"{name} {version}" for name, version in evaluation.tables.items())
    yield f"drafts of {evaluation.lookahead} tokens; table versions: {state}"
    if limits := evaluation.suffix_limits:
        yield f"suffix drafts: {', '.join(f'{name} {limit}' for name, limit in limits.items())}"
    yield f"drafters: {', '.join(map(str, evaluation.drafters))}"
    if incomplete := counts.get("incomplete", 0):
        yield f"{incomplete:,} requests skipped: incomplete in these table versions"
    if sampled := counts.get("tokens_sampled", 0):
        outside = counts.get("tokens_outside_top_k", 0)
        yield (
            f"sampled requests have expected figures; {outside:,} of {sampled:,} tokens are not in the target's "
            f"recorded top k and count slightly too low (traces.top_k)"
        )


def render_evaluation_page(evaluation: RequestEvaluation) -> str:
    """Return the evaluation as a page."""
    rows = [
        (
            *(group, drafter.short, f"{figures.requests:,}", f"{figures.verify_steps:,.0f}"),
            *(f"{1 + figures.accepted_per_step.value:.3f}", _bounds(figures.accepted_per_step)),
            f"{1 + figures.all_positions:.3f}",
        )
        for group in evaluation.groups
        for i, drafter in enumerate(evaluation.drafters)
        for figures in [evaluation.figures(i, group)]
    ]
    return render_page(
        TEMPLATES / "replay_evaluate.html",
        requests=len(evaluation.requests),
        lengths=_lengths_chart(evaluation),
        depths=_depths_chart(evaluation),
        columns=("requests of", "drafter", "requests", "verify steps", "acceptance length", "95 %", "all positions"),
        rows=rows,
        notes=list_notes(evaluation),
    )


def _lengths_chart(evaluation: RequestEvaluation) -> str:
    """Draw the acceptance length and its interval of each drafter in each group."""
    groups, drafters = list(evaluation.groups), evaluation.drafters
    with mpl.rc_context(chart_style("lengths")):
        figure, axes = new_figure(0.9 + _ROW_IN * len(groups) * max(len(drafters), 1))
        for i, drafter in enumerate(drafters):
            color = _COLORS[i % len(_COLORS)]
            intervals = [evaluation.figures(i, group).accepted_per_step for group in groups]
            heights = [-g - (i + 0.5) / (len(drafters) + 1) for g in range(len(groups))]
            for interval, height in zip(intervals, heights, strict=True):
                axes.plot([1 + interval.low, 1 + interval.high], [height] * 2, color=color, linewidth=2)
            axes.plot([1 + interval.value for interval in intervals], heights, "o", color=color, label=drafter.short)
        axes.set_yticks([-g - 0.45 for g in range(len(groups))], groups, color=INK)
        axes.grid(visible=True, axis="x")
        axes.set_xlim(left=1)
        axes.set_xlabel("acceptance length, tokens", color=MUTED)
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)
        return render_svg(figure)


def _depths_chart(evaluation: RequestEvaluation) -> str:
    """Draw the acceptance by depth of each drafter over all requests."""
    with mpl.rc_context(chart_style("depths")):
        figure, axes = new_figure(3.2)
        deepest = 0
        for i, drafter in enumerate(evaluation.drafters):
            shares = evaluation.figures(i, ALL).by_depth
            deepest = max(deepest, len(shares))
            axes.plot(
                range(1, len(shares) + 1),
                shares,
                "o-",
                color=_COLORS[i % len(_COLORS)],
                linewidth=2.2,
                label=drafter.short,
            )
        axes.set_xticks(range(1, deepest + 1))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("depth", color=MUTED)
        axes.set_ylabel("share accepted")
        axes.legend(frameon=False)
        return render_svg(figure)


def _build_differences_table(evaluation: RequestEvaluation) -> Table:
    table = new_table(
        "requests of",
        "drafter",
        "against",
        right=("difference", "95 %", ""),
        title="acceptance length, paired",
    )
    for group in evaluation.groups:
        for (later, earlier), difference in evaluation.differences(group).items():
            names = evaluation.drafters[later].short, evaluation.drafters[earlier].short
            verdict = "" if difference.is_clear else "may be chance"
            interval = f"{difference.low:+.3f} to {difference.high:+.3f}"
            table.add_row(group, *names, f"{difference.value:+.3f}", interval, verdict)
    return table


def _bounds(interval: Interval) -> str:
    """Return the bounds of an acceptance length; the interval is of accepted tokens per step."""
    return f"{1 + interval.low:.3f} - {1 + interval.high:.3f}"
