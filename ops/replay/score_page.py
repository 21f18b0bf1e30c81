"""A score as one HTML file. Pure."""

from __future__ import annotations

from html import escape

import matplotlib as mpl

from ops.replay.score_table import bounds, notes
from ops.report.canvas import INK, MUTED, OTHERS, SERIES, figure_of, style, svg
from ops.report.demo_page import STYLE
from trainer.replay.request_evaluation import ALL, RequestEvaluation

COLOURS = (SERIES, *OTHERS)
_ROW_IN = 0.32


def page(found: RequestEvaluation) -> str:
    """The whole page."""
    rows = "".join(_rows(found, group) for group in found.groups)
    told = "".join(f"<p>{escape(note)}</p>" for note in notes(found))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Aurora Stream: versions on past requests</title>
<style>
{STYLE}</style>
</head>
<body>
<h1>What versions would have accepted</h1>
<p>{len(found.requests):,} requests of the past. Accepted tokens per step is drafted tokens kept per verify step, the
bonus token excluded,
along the verify steps that serving would have run; intervals are over requests, 95 %.</p>
<h2>Accepted tokens per step</h2>
{lengths_chart(found)}
<h2>Acceptance by depth</h2>
<p>Of the verify steps whose draft could be kept so deep, the share in which it was.</p>
{depths_chart(found)}
<h2>Figures</h2>
<div class="scroll"><table>
<thead><tr><th>requests of</th><th>version</th><th class="number">requests</th><th class="number">verify steps</th>
<th class="number">accepted tokens per step</th>
<th class="number">95 %</th><th class="number">over all positions</th></tr></thead>
<tbody>{rows}</tbody>
</table></div>
<h2>Notes</h2>
{told}
</body>
</html>
"""


def lengths_chart(found: RequestEvaluation) -> str:
    """A dot with its interval for each version in each group."""
    groups, versions = list(found.groups), found.versions
    with mpl.rc_context(style("lengths")):
        figure, axes = figure_of(0.9 + _ROW_IN * len(groups) * max(len(versions), 1))
        for i, named in enumerate(versions):
            own = [found.figures(i, group).accepted_per_step for group in groups]
            heights = [-g - (i + 0.5) / (len(versions) + 1) for g in range(len(groups))]
            for interval, height in zip(own, heights, strict=True):
                axes.plot([interval.low, interval.high], [height] * 2, color=COLOURS[i % len(COLOURS)], linewidth=2)
            axes.plot(
                [interval.value for interval in own], heights, "o", color=COLOURS[i % len(COLOURS)], label=named.short
            )
        axes.set_yticks([-g - 0.45 for g in range(len(groups))], groups, color=INK)
        axes.grid(visible=True, axis="x")
        axes.set_xlim(left=0)
        axes.set_xlabel("accepted tokens per step", color=MUTED)
        axes.legend(frameon=False, loc="lower right")
        return svg(figure)


def depths_chart(found: RequestEvaluation) -> str:
    """The share of drafts that were kept so deep, for each version over all requests."""
    with mpl.rc_context(style("depths")):
        figure, axes = figure_of(3.2)
        depths = range(1, found.lookahead + 1)
        for i, named in enumerate(found.versions):
            shares = found.figures(i, ALL).by_depth
            axes.plot(depths, shares, "o-", color=COLOURS[i % len(COLOURS)], linewidth=2.2, label=named.short)
        axes.set_xticks(list(depths))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("depth", color=MUTED)
        axes.set_ylabel("kept so deep")
        axes.legend(frameon=False)
        return svg(figure)


def _rows(found: RequestEvaluation, group: str) -> str:
    rows = []
    for i, named in enumerate(found.versions):
        one = found.figures(i, group)
        numbers = (
            *(f"{one.requests:,}", f"{one.verify_steps:,.0f}", f"{one.accepted_per_step.value:.3f}"),
            *(bounds(one.accepted_per_step), f"{one.all_positions:.3f}"),
        )
        cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
        rows.append(f"<tr><td>{escape(group)}</td><td>{escape(named.short)}</td>{cells}</tr>")
    return "".join(rows)
