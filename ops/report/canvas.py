"""What all charts share: their look, and how a figure becomes a part of a page.

Colours are written as CSS variables of the page (``PALETTE``), so that one picture is right on light and on dark
paper. The series colours are Okabe and Ito's, which colour-blind people can tell apart.
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
"""Further series, where a chart has more than one."""

PALETTE = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    SERIES: "var(--series)",
    FAINT: "var(--faint)",
    LEVEL: "var(--level)",
    SHADE_A: "var(--shade-a)",
    SHADE_B: "var(--shade-b)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(OTHERS, start=2)},
}
"""Colours that matplotlib writes, and the variable that stands for each in the page."""

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
    # Or the two zeros of a corner lie over each other.
    "xtick.major.pad": 8,
    "ytick.major.pad": 6,
}


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of the x axis that belongs to one domain."""

    start: float
    end: float
    name: str


def style(chart: str) -> dict[RcKeyType, object]:
    """The style, with ids that differ from chart to chart: all of them end up in one page."""
    return {**_STYLE, "svg.hashsalt": chart}


def figure_of(height_in: float) -> tuple[Figure, Axes]:
    """One pair of axes, as wide as the page."""
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def shade(axes: Axes, spans: Sequence[Span]) -> None:
    """Domains as shaded stretches with their names below the top edge."""
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


def nothing(figure: Figure, axes: Axes, why: str) -> str:
    """A chart that only says why there is nothing to draw, in a line's height."""
    figure.set_figheight(0.9)
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", color=MUTED, transform=axes.transAxes)
    return svg(figure)


def svg(figure: Figure) -> str:
    """The figure as an ``svg`` element that grows with the page, its colours the page's variables."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for written, variable in PALETTE.items():
        text = text.replace(written, variable)
    return text
