"""Compare the variants of a replay experiment: as JSON, as a terminal table, as a page and as a chart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from rich.table import Table

from ops.cli.terminal import new_table
from ops.report.charts import CURVES_HEIGHT_IN, draw_curves, label_axes
from ops.report.page import STYLE, TEMPLATES, render_page
from ops.report.theme import MUTED, OTHERS, SERIES, chart_style, new_figure, render_svg
from trainer.replay.acceptance_figures import Interval, paired_difference
from trainer.replay.experiment import ExperimentPlan, VariantResult
from trainer.replay.learning_curve import (
    CURVE_WINDOW,
    FINAL_TOKENS,
    final_accepted_per_step,
    learning_curve,
    mean_accepted_per_step,
)
from trainer.replay.prequential import BatchScore

LAST_STEPS = 50
"""Training steps at the end over which the final loss is averaged."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Results of a completed experiment."""

    plan: ExperimentPlan
    results: tuple[VariantResult, ...]

    def difference(self, result: VariantResult) -> Interval | None:
        """Return the accepted tokens per step above the first variant, paired by batch.

        None for the first variant, and for a variant with other batches.
        """
        first = self.results[0]
        if result is first or _batches(result.scores) != _batches(first.scores):
            return None
        return paired_difference(_counts(result.scores), _counts(first.scores))

    def summary(self) -> dict[str, Any]:
        """Return the comparison as JSON."""
        return {
            "experiment": self.plan.name,
            "span": self.plan.span.model_dump(),
            "lookahead": self.plan.lookahead,
            "variants": [self._summarize_variant(result) for result in self.results],
        }

    def _summarize_variant(self, result: VariantResult) -> dict[str, Any]:
        difference = self.difference(result)
        points = result.scores
        by_label = {label: [p for p in points if p.label == label] for label in sorted({p.label for p in points})}
        return {
            "name": result.variant,
            "samples": result.counts.get("samples", 0),
            "tokens": sum(point.tokens for point in points),
            "steps": len(result.losses),
            "accepted_per_step": round(mean_accepted_per_step(points), 4),
            "accepted_per_step_at_end": round(final_accepted_per_step(points), 4),
            "by_label": {label: round(mean_accepted_per_step(part), 4) for label, part in by_label.items()},
            "loss_at_end": round(fmean(result.losses[-LAST_STEPS:]), 4),
            "difference": None if difference is None else {**difference.summary(), "clear": difference.is_clear},
            "seconds": round(result.training_s + result.scoring_s, 1),
        }


def build_table(comparison: Comparison) -> Table:
    """Return the comparison as a terminal table."""
    table = new_table("variant", right=("acceptance length", "at the end", "difference", "95 %", "loss", "seconds"))
    for variant in comparison.summary()["variants"]:
        table.add_row(*_cells(variant), f"{variant['seconds']:,.0f}")
    return table


def render_experiment_page(comparison: Comparison) -> str:
    """Return the comparison as a page."""
    return render_page(
        TEMPLATES / "replay_train.html",
        name=comparison.plan.name,
        span=comparison.plan.span,
        over=CURVE_WINDOW,
        lookahead=comparison.plan.lookahead,
        lengths=_lengths_chart(comparison),
        losses=_losses_chart(comparison),
        columns=(
            *("variant", "acceptance length, whole span", f"last {FINAL_TOKENS:,} tokens"),
            *("against the first", "95 %", "loss at the end"),
        ),
        rows=map(_cells, comparison.summary()["variants"]),
    )


def render_chart(comparison: Comparison) -> str:
    """Return the acceptance curves as a standalone SVG file with light and dark colors."""
    light, dark = (";".join(_color_variables(dark=dark)) for dark in (False, True))
    style = f"svg{{color-scheme: light dark;{light}; background: var(--paper)}}"
    style += f" @media (prefers-color-scheme: dark){{svg{{{dark}}}}} text{{font-family: system-ui, sans-serif}}"
    return _lengths_chart(comparison).replace("<defs>", f"<defs>\n  <style>{style}</style>", 1)


def _lengths_chart(comparison: Comparison) -> str:
    with mpl.rc_context(chart_style("variants")):
        figure, axes = new_figure(CURVES_HEIGHT_IN)
        draw_curves(axes, {result.variant: learning_curve(result.scores) for result in comparison.results})
        label_axes(axes)
        return render_svg(figure)


def _losses_chart(comparison: Comparison) -> str:
    """Draw the loss of the accepted term at each training step."""
    with mpl.rc_context(chart_style("losses")):
        figure, axes = new_figure(CURVES_HEIGHT_IN)
        for result, color in zip(comparison.results, (SERIES, *OTHERS) * len(comparison.results), strict=False):
            axes.plot(result.losses, color=color, linewidth=1.2, label=result.variant)
        axes.set_xlabel("training steps", color=MUTED)
        axes.set_ylabel("loss")
        axes.legend(frameon=False)
        return render_svg(figure)


def _color_variables(*, dark: bool) -> list[str]:
    """Return the color variables of the style sheet; the light ones come first in it."""
    light, _, rest = STYLE.partition("@media")
    return re.findall(r"--[\w-]+: [^;]+", rest if dark else light)


def _cells(variant: dict[str, Any]) -> list[str]:
    """Return name, acceptance lengths, difference to the first variant with its interval, and final loss."""
    difference = variant["difference"]
    against = ("-", "-")
    if difference is not None:
        against = f"{difference['value']:+.3f}", f"{difference['low']:+.3f} to {difference['high']:+.3f}"
    return [
        variant["name"],
        f"{1 + variant['accepted_per_step']:.3f}",
        f"{1 + variant['accepted_per_step_at_end']:.3f}",
        *against,
        f"{variant['loss_at_end']:.3f}",
    ]


def _batches(points: Sequence[BatchScore]) -> list[tuple[str, int]]:
    return [(point.label, point.tokens) for point in points]


def _counts(points: Sequence[BatchScore]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([(point.accepted, point.positions) for point in points], dtype=np.float64)
