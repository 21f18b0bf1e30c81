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
from ops.report.charts import CURVES_HEIGHT_IN, draw_curves, label_axes, split_axes
from ops.report.theme import FAINT, LEVEL, DomainSpan, chart_style, new_figure, render_empty, render_svg, shade_domains
from trainer.replay.learning_curve import CurveValue, learning_curve

_GRID_POINTS = 160


def base_chart(mixed: Runs) -> str:
    """The base on the mixed stream: each seed faint, their mean strong, and the goal."""
    with mpl.rc_context(chart_style("base")):
        figure, axes = new_figure(CURVES_HEIGHT_IN)
        curves = [learning_curve(learned.scores) for learned in mixed.seeds]
        for values in curves:
            axes.plot(*split_axes(values), color=FAINT, linewidth=1.4)
        draw_curves(axes, {"mean": mean_of(curves)})
        axes.axhline(2, color=LEVEL, linewidth=1.4, linestyle=(0, (5, 3)))
        if axes.get_xlim()[1] > GOAL_TOKENS:
            axes.axvline(GOAL_TOKENS, color=LEVEL, linewidth=1.4, linestyle=(0, (5, 3)))
        label_axes(axes)
        return render_svg(figure)


def domains_chart(mixed: Runs) -> str:
    """The base on the mixed stream, each domain's requests on their own; means over the seeds."""
    with mpl.rc_context(chart_style("domains")):
        figure, axes = new_figure(CURVES_HEIGHT_IN)
        draw_curves(
            axes,
            {
                domain: mean_of([learning_curve(learned.scores, OVER_BY_DOMAIN, domain) for learned in mixed.seeds])
                for domain in prompts.DOMAINS
                if all(any(point.label == domain for point in learned.scores) for learned in mixed.seeds)
            },
        )
        label_axes(axes)
        return render_svg(figure)


def shifts_chart(learned: Learned | None) -> str:
    """One seed of an ordered stream: the draft that learns, and the one that was frozen when the first domain ended."""
    with mpl.rc_context(chart_style("shifts")):
        figure, axes = new_figure(CURVES_HEIGHT_IN)
        if learned is None:
            return render_empty(figure, axes, "no ordered stream was run")
        drawn = {"learns": learning_curve(learned.scores)}
        if static := static_curve(learned.scores):
            drawn["frozen"] = static
        draw_curves(axes, drawn)
        shade_domains(axes, stretches(learned))
        label_axes(axes)
        return render_svg(figure)


def question_chart(name: str, runs: Sequence[Runs]) -> str:
    """The variants of one question; means over the seeds."""
    with mpl.rc_context(chart_style(name)):
        figure, axes = new_figure(CURVES_HEIGHT_IN)
        draw_curves(
            axes, {r.variant.name: mean_of([learning_curve(learned.scores) for learned in r.seeds]) for r in runs}
        )
        label_axes(axes)
        return render_svg(figure)


def mean_of(curves: Sequence[Sequence[CurveValue]]) -> list[CurveValue]:
    """The mean of curves whose values stand at different tokens, over what all of them cover."""
    start = max(values[0].tokens for values in curves)
    end = min(values[-1].tokens for values in curves)
    grid = np.linspace(start, max(start, end), _GRID_POINTS)
    points = [([value.tokens for value in values], [value.accepted_per_step for value in values]) for values in curves]
    lengths = np.mean([np.interp(grid, *values) for values in points], axis=0)
    return [CurveValue(int(tokens), float(length)) for tokens, length in zip(grid, lengths, strict=True)]


def stretches(learned: Learned) -> list[DomainSpan]:
    """Where each domain of an ordered stream lies."""
    sizes = [(d, sum(p.tokens for p in group)) for d, group in groupby(learned.scores, key=lambda point: point.label)]
    ends = accumulate(size for _, size in sizes)
    return [DomainSpan(end - size, end, domain) for (domain, size), end in zip(sizes, ends, strict=True)]
