"""The page of ``aurora bench learning``: curves, changes of domain, and the table of variants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from statistics import median

import matplotlib as mpl
import numpy as np

from ops.bench import prompts
from ops.bench.learning.learning_figures import LEVELS, OVER_BY_DOMAIN, SeedInterval, median_reached, static_curve
from ops.bench.learning.study import GOAL_TOKENS, Study, VariantComparison, VariantRuns
from ops.bench.learning.trials import TrialResult
from ops.report.charts import CURVES_HEIGHT_IN, draw_curves, label_axes, split_axes
from ops.report.page import render_page
from ops.report.theme import (
    FAINT,
    LEVEL,
    DomainSpan,
    chart_style,
    new_figure,
    render_empty,
    render_svg,
    shade_domains,
)
from schemas.build_info import code_revision
from trainer.replay.learning_curve import CURVE_WINDOW, CurveValue, learning_curve

_GRID_POINTS = 160
_DASHED = (0, (5, 3))


def render_learning_page(study: Study) -> str:
    """Return the page of a study."""
    mixed, ordered = study.base, study.find("base", "ordered")
    comparisons = [comparison for runs in study.runs if (comparison := study.compare(runs)) is not None]
    seeds = "one seed" if len(mixed.seeds) == 1 else f"{len(mixed.seeds)} seeds"
    return render_page(
        Path(__file__).with_name("learning.html"),
        subtitle=(
            f"{len(study.traffic.requests):,} recorded requests of four domains, {study.traffic.tokens:,} tokens, "
            f"replayed offline; {seeds}; code {code_revision()[:12]}."
        ),
        headline_figures=_headline(mixed, ordered),
        over=f"{CURVE_WINDOW:,}",
        base=base_chart(mixed),
        domains=domains_chart(mixed),
        shifts=shifts_chart(ordered.seeds[0] if ordered else None),
        shift_rows=_shift_rows(ordered),
        verdict=state_verdict(comparisons),
        variants=[_variant_row(runs, study.compare(runs)) for runs in study.runs],
        questions=[
            {"title": name[0].upper() + name[1:], "chart": variants_chart(name, runs)}
            for name, runs in _group_by_question(study).items()
        ],
        machine="{processor}, {threads} thread, torch {torch}.".format_map(study.session.machine),
    )


def state_verdict(comparisons: Sequence[VariantComparison]) -> str:
    """State which variants differ from their comparison by more than chance."""
    if not comparisons:
        return "Nothing was compared."
    if all(comparison.overall.low is None for comparison in comparisons):
        return "One seed cannot separate a difference from chance; use two or more."
    clear = [c for c in comparisons if c.overall.is_clear]
    sentences = []
    for word, sign in (("higher", 1), ("lower", -1)):
        if names := ", ".join(_describe(c) for c in clear if c.overall.mean * sign > 0):
            sentences.append(f"Over the whole stream the acceptance length is clearly {word} with {names}.")
    unclear = len(comparisons) - len(clear)
    if unclear == 1:
        sentences.append("One comparison could be chance: its interval contains zero.")
    elif unclear:
        sentences.append(f"{unclear} comparisons could be chance: their intervals contain zero.")
    return " ".join(sentences)


def _describe(comparison: VariantComparison) -> str:
    variant, mean = comparison.runs.variant, comparison.overall.mean
    against = "" if variant.against == "base" else f" against {variant.against}"
    return f"{variant.name}{against} ({mean:+.2f}, {comparison.runs.order})"


def _group_by_question(study: Study) -> dict[str, list[VariantRuns]]:
    """Return the variants in the order of the base by question, after the base if they are compared with it."""
    groups: dict[str, list[VariantRuns]] = {}
    for runs in study.runs:
        if runs.order == study.base.order and runs.variant.name != "base":
            first = [study.base] if runs.variant.against == "base" else []
            groups.setdefault(runs.variant.question, first).append(runs)
    return groups


def _headline(mixed: VariantRuns, ordered: VariantRuns | None) -> list[tuple[str, str]]:
    figures = [
        (
            _tokens(median_reached(mixed.tokens_to(level))),
            f"tokens of {mixed.order} traffic to acceptance length {1 + level:g}",
        )
        for level in LEVELS
    ]
    figures.append((f"{1 + median(mixed.final):.2f}", f"acceptance length at the end of the {mixed.order} stream"))
    if ordered:
        ratio = f"{median(ordered.over_static):.2f} : 1"
        figures.append((ratio, "tokens per verify step, over a draft that was frozen after the first domain"))
    return figures


def _shift_rows(ordered: VariantRuns | None) -> list[tuple[str, ...]]:
    return [
        (
            str(result.seed),
            shift.domain,
            *(f"{1 + shift.before:.2f}", f"{1 + shift.after:.2f}"),
            *(_tokens(shift.recovered_after), _tokens(shift.settled_after), f"{shift.over_static:.2f}"),
        )
        for result, shifts in (zip(ordered.seeds, ordered.shifts, strict=True) if ordered else ())
        for shift in shifts
    ]


def _variant_row(runs: VariantRuns, comparison: VariantComparison | None) -> tuple[str, ...]:
    differences = [comparison.overall, comparison.final] if comparison else []
    return (
        *(runs.variant.name, runs.order, runs.variant.against if comparison else "-"),
        *(f"{1 + median(runs.overall):.3f}", f"{1 + median(runs.final):.3f}"),
        _tokens(median_reached(runs.tokens_to(1.0))),
        *(map(_difference, differences) if differences else ("-", "-")),
        f"{median(result.training_tokens_per_s for result in runs.seeds):.0f}",
    )


def _difference(difference: SeedInterval) -> str:
    text = f"{difference.mean:+.3f}"
    if difference.low is not None and difference.high is not None:
        text += f" [{difference.low:+.3f}, {difference.high:+.3f}]"
    return text.replace("-", "\N{MINUS SIGN}") + ("*" if difference.is_clear else "")


def _tokens(value: float | None) -> str:
    return "not reached" if value is None else f"{value:,.0f}"


def base_chart(mixed: VariantRuns) -> str:
    """Draw the base on the mixed stream: each seed, their mean, and the goal."""
    with mpl.rc_context(chart_style("base")):
        figure, axes = new_figure(CURVES_HEIGHT_IN)
        curves = [learning_curve(result.scores) for result in mixed.seeds]
        for values in curves:
            axes.plot(*split_axes(values), color=FAINT, linewidth=1.4)
        draw_curves(axes, {"mean": _mean_curve(curves)})
        axes.axhline(2, color=LEVEL, linewidth=1.4, linestyle=_DASHED)
        if axes.get_xlim()[1] > GOAL_TOKENS:
            axes.axvline(GOAL_TOKENS, color=LEVEL, linewidth=1.4, linestyle=_DASHED)
        label_axes(axes)
        return render_svg(figure)


def domains_chart(mixed: VariantRuns) -> str:
    """Draw the base on the mixed stream by domain; means over the seeds."""
    with mpl.rc_context(chart_style("domains")):
        figure, axes = new_figure(CURVES_HEIGHT_IN)
        curves = {
            domain: _mean_curve([learning_curve(result.scores, OVER_BY_DOMAIN, domain) for result in mixed.seeds])
            for domain in prompts.DOMAINS
            if all(any(score.label == domain for score in result.scores) for result in mixed.seeds)
        }
        draw_curves(axes, curves)
        label_axes(axes)
        return render_svg(figure)


def shifts_chart(result: TrialResult | None) -> str:
    """Draw one seed of an ordered stream: the learning draft and the frozen one."""
    with mpl.rc_context(chart_style("shifts")):
        figure, axes = new_figure(CURVES_HEIGHT_IN)
        if result is None:
            return render_empty(figure, axes, "no ordered stream was run")
        curves = {"learns": learning_curve(result.scores)}
        if frozen := static_curve(result.scores):
            curves["frozen"] = frozen
        draw_curves(axes, curves)
        sizes = [
            (domain, sum(score.tokens for score in group))
            for domain, group in groupby(result.scores, key=lambda score: score.label)
        ]
        ends = accumulate(size for _, size in sizes)
        shade_domains(
            axes, [DomainSpan(end - size, end, domain) for (domain, size), end in zip(sizes, ends, strict=True)]
        )
        label_axes(axes)
        return render_svg(figure)


def variants_chart(name: str, runs: Iterable[VariantRuns]) -> str:
    """Draw the variants of one question; means over the seeds."""
    with mpl.rc_context(chart_style(name)):
        figure, axes = new_figure(CURVES_HEIGHT_IN)
        curves = {r.variant.name: _mean_curve([learning_curve(result.scores) for result in r.seeds]) for r in runs}
        draw_curves(axes, curves)
        label_axes(axes)
        return render_svg(figure)


def _mean_curve(curves: Sequence[Sequence[CurveValue]]) -> list[CurveValue]:
    """Return the mean of curves with values at different tokens, over the range that all of them cover."""
    start = max(values[0].tokens for values in curves)
    end = min(values[-1].tokens for values in curves)
    grid = np.linspace(start, max(start, end), _GRID_POINTS)
    tokens_and_means = [np.array(values, dtype=float).T for values in curves]
    means = np.mean([np.interp(grid, tokens, accepted) for tokens, accepted in tokens_and_means], axis=0)
    return [CurveValue(int(at), float(mean)) for at, mean in zip(grid, means, strict=True)]
