"""Theme of all charts, and the conversion of a figure to SVG.

Colors are CSS variables of the page (``PALETTE``), so one chart suits light and dark pages. The series colors are Okabe
and Ito's, which color-blind readers can tell apart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

INK, MUTED, GRID, SERIES, FAINT, LEVEL, SHADE_A, SHADE_B = (f"#0{i}0{i}0{i}" for i in range(1, 9))
OTHERS = tuple(f"#1{i}1{i}1{i}" for i in range(2, 8))
"""Colors of the second and later series of a chart."""

PALETTE = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    SERIES: "var(--series)",
    FAINT: "var(--faint)",
    LEVEL: "var(--level)",
    SHADE_A: "var(--shade-a)",
    SHADE_B: "var(--shade-b)",
    **{color: f"var(--series-{i})" for i, color in enumerate(OTHERS, start=2)},
}
"""Placeholder color in the matplotlib output -> CSS variable of the page."""

_WIDTH_IN = 10.0
_STYLE: dict[RcKeyType, object] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    # A smaller pad overlaps the two zeros at the origin.
    "xtick.major.pad": 8,
    "ytick.major.pad": 6,
}


@dataclass(frozen=True, slots=True)
class DomainSpan:
    """A range of the x axis with traffic of one domain."""

    start: float
    end: float
    name: str


def chart_style(chart: str) -> dict[RcKeyType, object]:
    """Return matplotlib settings whose element ids are unique to a chart: one page holds several charts."""
    return {**_STYLE, "svg.hashsalt": chart}


def new_figure(height_in: float) -> tuple[Figure, Axes]:
    """Return a figure of the page's width with one pair of axes."""
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def shade_domains(axes: Axes, spans: Sequence[DomainSpan]) -> None:
    """Shade the range of each domain and write its name below the top edge."""
    for i, span in enumerate(spans):
        axes.axvspan(span.start, span.end, color=(SHADE_A, SHADE_B)[i % 2], linewidth=0, zorder=0)
        axes.annotate(
            f"{span.name} prompts",
            (span.start, 1),
            (8, -6),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            color=MUTED,
            fontsize=11,
        )


def render_empty(figure: Figure, axes: Axes, reason: str) -> str:
    """Return a chart of one line that states why it is empty."""
    figure.set_figheight(0.9)
    axes.set_axis_off()
    axes.text(0.5, 0.5, reason, ha="center", va="center", color=MUTED, transform=axes.transAxes)
    return render_svg(figure)


def render_svg(figure: Figure) -> str:
    """Return the figure as an ``svg`` element that scales with the page and uses its color variables."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for written, variable in PALETTE.items():
        text = text.replace(written, variable)
    return text
