"""What an experiment says: each variant's figures, and how far each is from the first one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

from trainer.replay.acceptance_figures import Interval, paired_difference
from trainer.replay.experiment import ExperimentPlan, VariantResult
from trainer.replay.learning_curve import final_accepted_per_step, mean_accepted_per_step
from trainer.replay.prequential import BatchScore

LAST_STEPS = 50
"""Steps at the end that the loss is taken over."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """An experiment that is done."""

    plan: ExperimentPlan
    results: tuple[VariantResult, ...]

    def difference(self, result: VariantResult) -> Interval | None:
        """By how much the accepted tokens per step over the whole past is above the first variant's, batch by batch;
        None for the
        first, and where the two did not see the same batches."""
        first = self.results[0]
        if result is first or _batches(result.scores) != _batches(first.scores):
            return None
        return paired_difference(_counts(result.scores), _counts(first.scores))

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "experiment": self.plan.name,
            "span": self.plan.span.model_dump(),
            "lookahead": self.plan.lookahead,
            "variants": [self._one(result) for result in self.results],
        }

    def _one(self, result: VariantResult) -> dict[str, Any]:
        difference = self.difference(result)
        points = result.scores
        return {
            "name": result.variant,
            "windows": result.counts.get("pieces", 0),
            "tokens": sum(point.tokens for point in points),
            "steps": len(result.losses),
            "accepted_per_step": round(mean_accepted_per_step(points), 4),
            "accepted_per_step_at_end": round(final_accepted_per_step(points), 4),
            "by_label": {label: round(mean_accepted_per_step(part), 4) for label, part in by_label(points).items()},
            "loss_at_end": round(fmean(result.losses[-LAST_STEPS:]), 4),
            "difference": None if difference is None else {**difference.summary(), "clear": difference.is_clear},
            "seconds": round(result.training_s + result.scoring_s, 1),
        }


def by_label(points: Sequence[BatchScore]) -> dict[str, list[BatchScore]]:
    """Points by the label of their traffic."""
    return {label: [p for p in points if p.label == label] for label in sorted({p.label for p in points})}


def table(comparison: Comparison) -> Table:
    """For the terminal."""
    told = comparison.summary()["variants"]
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("variant", no_wrap=True)
    for column in ("accepted tokens per step", "at the end", "difference", "95 %", "loss", "seconds"):
        shown.add_column(column, justify="right", no_wrap=True)
    for one in told:
        difference = one["difference"]
        against = ("", "")
        if difference is not None:
            against = f"{difference['value']:+.3f}", f"{difference['low']:+.3f} to {difference['high']:+.3f}"
        lengths = f"{one['accepted_per_step']:.3f}", f"{one['accepted_per_step_at_end']:.3f}"
        shown.add_row(one["name"], *lengths, *against, f"{one['loss_at_end']:.3f}", f"{one['seconds']:,.0f}")
    return shown


def _batches(points: Sequence[BatchScore]) -> list[tuple[str, int]]:
    return [(point.label, point.tokens) for point in points]


def _counts(points: Sequence[BatchScore]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([(point.accepted, point.positions) for point in points], dtype=np.float64)
