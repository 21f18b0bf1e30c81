"""Curves of accepted tokens per step over tokens of traffic, drawn alike in every page. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from ops.report.canvas import MUTED, OTHERS, SERIES
from trainer.replay.learning_curve import CurveValue

HEIGHT_IN = 3.5
_COLOURS = (SERIES, *OTHERS)
_LABEL_IN = 0.19
"""Height of a label at the right edge."""


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights for labels, in the order given, moved up until no two are closer than ``gap``."""
    placed: dict[int, float] = {}
    lowest = -float("inf")
    for i in sorted(range(len(heights)), key=heights.__getitem__):
        lowest = placed[i] = max(heights[i], lowest + gap)
    return [placed[i] for i in range(len(heights))]


def lines(axes: Axes, curves: Mapping[str, Sequence[CurveValue]]) -> None:
    """Curves in colours of their own, each named at its right end."""
    top = 1.1 * max([0.1, *(value.accepted_per_step for values in curves.values() for value in values)])
    axes.set_ylim(0, top)
    axes.set_xlim(0, max(values[-1].tokens for values in curves.values()))
    heights = spread([values[-1].accepted_per_step for values in curves.values()], _LABEL_IN / HEIGHT_IN * top)
    for i, ((name, values), height) in enumerate(zip(curves.items(), heights, strict=True)):
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(*axes_of(values), color=colour, linewidth=2.4, solid_capstyle="round")
        axes.annotate(
            f"{name} {values[-1].accepted_per_step:.2f}",
            (axes.get_xlim()[1], height),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )


def axes_of(values: Sequence[CurveValue]) -> tuple[list[int], list[float]]:
    """Tokens and lengths."""
    return [value.tokens for value in values], [value.accepted_per_step for value in values]


def name_axes(axes: Axes) -> None:
    """Tokens of traffic below, accepted tokens per step beside."""
    axes.xaxis.set_major_formatter(lambda tokens, _place: f"{tokens / 1000:g}k" if tokens else "0")
    axes.set_xlabel("tokens of traffic, prompts included", color=MUTED)
    axes.set_ylabel("accepted tokens per step")
