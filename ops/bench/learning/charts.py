"""Curves of accepted tokens per step over tokens of traffic, as SVG text. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import matplotlib as mpl
import numpy as np

from ops.bench import prompts
from ops.bench.learning.learning_figures import OVER_BY_DOMAIN, static_curve
from ops.bench.learning.study import GOAL_TOKENS
from ops.bench.learning.study import VariantRuns as Runs
from ops.bench.learning.trials import TrialResult as Learned
from ops.report.acceptance_curves import HEIGHT_IN, axes_of, lines, name_axes
from ops.report.canvas import FAINT, LEVEL, Span, figure_of, nothing, shade, style, svg
from trainer.replay.learning_curve import CurveValue, learning_curve

_GRID_POINTS = 160


def base_chart(mixed: Runs) -> str:
    """The base on the mixed stream: each seed faint, their mean strong, and the goal."""
    with mpl.rc_context(style("base")):
        figure, axes = figure_of(HEIGHT_IN)
        curves = [learning_curve(learned.scores) for learned in mixed.seeds]
        for values in curves:
            axes.plot(*axes_of(values), color=FAINT, linewidth=1.4)
        lines(axes, {"mean": mean_of(curves)})
        axes.axhline(1, color=LEVEL, linewidth=1.4, linestyle=(0, (5, 3)))
        if axes.get_xlim()[1] > GOAL_TOKENS:
            axes.axvline(GOAL_TOKENS, color=LEVEL, linewidth=1.4, linestyle=(0, (5, 3)))
        name_axes(axes)
        return svg(figure)


def domains_chart(mixed: Runs) -> str:
    """The base on the mixed stream, each domain's requests on their own; means over the seeds."""
    with mpl.rc_context(style("domains")):
        figure, axes = figure_of(HEIGHT_IN)
        lines(
            axes,
            {
                domain: mean_of([learning_curve(learned.scores, OVER_BY_DOMAIN, domain) for learned in mixed.seeds])
                for domain in prompts.DOMAINS
                if all(any(point.label == domain for point in learned.scores) for learned in mixed.seeds)
            },
        )
        name_axes(axes)
        return svg(figure)


def shifts_chart(learned: Learned | None) -> str:
    """One seed of an ordered stream: the draft that learns, and the one that was frozen when the first domain ended."""
    with mpl.rc_context(style("shifts")):
        figure, axes = figure_of(HEIGHT_IN)
        if learned is None:
            return nothing(figure, axes, "no ordered stream was run")
        drawn = {"learns": learning_curve(learned.scores)}
        if static := static_curve(learned.scores):
            drawn["frozen"] = static
        lines(axes, drawn)
        shade(axes, stretches(learned))
        name_axes(axes)
        return svg(figure)


def question_chart(name: str, runs: Sequence[Runs]) -> str:
    """The variants of one question; means over the seeds."""
    with mpl.rc_context(style(name)):
        figure, axes = figure_of(HEIGHT_IN)
        lines(axes, {r.variant.name: mean_of([learning_curve(learned.scores) for learned in r.seeds]) for r in runs})
        name_axes(axes)
        return svg(figure)


def mean_of(curves: Sequence[Sequence[CurveValue]]) -> list[CurveValue]:
    """The mean of curves whose values stand at different tokens, over what all of them cover."""
    start = max(values[0].tokens for values in curves)
    end = min(values[-1].tokens for values in curves)
    grid = np.linspace(start, max(start, end), _GRID_POINTS)
    lengths = np.mean([np.interp(grid, *axes_of(values)) for values in curves], axis=0)
    return [CurveValue(int(tokens), float(length)) for tokens, length in zip(grid, lengths, strict=True)]


def stretches(learned: Learned) -> list[Span]:
    """Where each domain of an ordered stream lies."""
    sizes = [(d, sum(p.tokens for p in group)) for d, group in groupby(learned.scores, key=lambda point: point.label)]
    ends = accumulate(size for _, size in sizes)
    return [Span(end - size, end, domain) for (domain, size), end in zip(sizes, ends, strict=True)]
