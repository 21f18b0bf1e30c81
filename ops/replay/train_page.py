"""An experiment as one HTML file, and its plot. Pure."""

from __future__ import annotations

import re
from html import escape

import matplotlib as mpl

from ops.replay.comparison import Comparison
from ops.report.acceptance_curves import HEIGHT_IN, lines, name_axes
from ops.report.canvas import MUTED, OTHERS, SERIES, figure_of, style, svg
from ops.report.demo_page import STYLE
from trainer.replay.learning_curve import CURVE_WINDOW, FINAL_TOKENS, learning_curve


def page(comparison: Comparison) -> str:
    """The whole page."""
    span = comparison.plan.span
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Aurora Stream: {escape(comparison.plan.name)}</title>
<style>
{STYLE}</style>
</head>
<body>
<h1>{escape(comparison.plan.name)}</h1>
<p>Variants that learned from one past, versions {span.accepted[0]} to {span.accepted[1]} of the table accepted,
in its time order. Every batch is scored before it is learned from; a value is taken over the last
{CURVE_WINDOW:,} tokens of traffic.</p>
<h2>Accepted tokens per step</h2>
{lengths_chart(comparison)}
<h2>Loss</h2>
{losses_chart(comparison)}
<h2>Figures</h2>
<div class="scroll"><table>
<thead><tr><th>variant</th><th class="number">accepted tokens per step, whole past</th>
<th class="number">last {FINAL_TOKENS:,} tokens</th>
<th class="number">against the first</th><th class="number">95 %</th>
<th class="number">loss at the end</th></tr></thead>
<tbody>{_rows(comparison)}</tbody>
</table></div>
<p style="margin-top:1.2rem">Accepted tokens per step is drafted tokens that are right, over chains of
{comparison.plan.lookahead} from all positions, the bonus token excluded. Intervals are over batches of the same past,
paired; they say nothing of other seeds.</p>
</body>
</html>
"""


def picture(comparison: Comparison) -> str:
    """The curves as an SVG file of its own, right on light and on dark paper."""
    variables = ";".join(_variables(STYLE, dark=False))
    dark = ";".join(_variables(STYLE, dark=True))
    look = f"svg{{color-scheme: light dark;{variables}; background: var(--paper)}}"
    look += f" @media (prefers-color-scheme: dark){{svg{{{dark}}}}} text{{font-family: system-ui, sans-serif}}"
    return lengths_chart(comparison).replace("<defs>", f"<defs>\n  <style>{look}</style>", 1)


def lengths_chart(comparison: Comparison) -> str:
    """Accepted tokens per step over the tokens of traffic."""
    with mpl.rc_context(style("variants")):
        figure, axes = figure_of(HEIGHT_IN)
        lines(axes, {result.variant: learning_curve(result.scores) for result in comparison.results})
        name_axes(axes)
        return svg(figure)


def losses_chart(comparison: Comparison) -> str:
    """The loss of the accepted term over the steps, each one faint."""
    with mpl.rc_context(style("losses")):
        figure, axes = figure_of(HEIGHT_IN)
        for result, colour in zip(comparison.results, (SERIES, *OTHERS) * len(comparison.results), strict=False):
            axes.plot(result.losses, color=colour, linewidth=1.2, label=result.variant)
        axes.set_xlabel("steps", color=MUTED)
        axes.set_ylabel("loss")
        axes.legend(frameon=False)
        return svg(figure)


def _variables(css: str, *, dark: bool) -> list[str]:
    """The colours of the page's style sheet: those of light paper come first."""
    light, _, rest = css.partition("@media")
    return re.findall(r"--[\w-]+: [^;]+", rest if dark else light)


def _rows(comparison: Comparison) -> str:
    rows = []
    for one in comparison.summary()["variants"]:
        difference = one["difference"]
        told = ("-", "-")
        if difference is not None:
            told = f"{difference['value']:+.3f}", f"{difference['low']:+.3f} to {difference['high']:+.3f}"
        numbers = (
            f"{one['accepted_per_step']:.3f}",
            f"{one['accepted_per_step_at_end']:.3f}",
            *told,
            f"{one['loss_at_end']:.3f}",
        )
        cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
        rows.append(f"<tr><td>{escape(one['name'])}</td>{cells}</tr>")
    return "".join(rows)
