"""``aurora bench learning``: what helps a speculator to learn from traffic, and by how much.

Every variant runs over the same recorded traffic with the same seeds; a seed draws the random weights, the order of the
stream, and what is replayed. Variants are compared seed by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from ops.bench.learning import figures, runs, variants
from ops.bench.learning.comparing import Interval, interval, paired
from ops.bench.learning.figures import LEVELS, Shift
from ops.bench.learning.prequential import Learned
from ops.bench.learning.traffic import Traffic
from ops.bench.learning.variants import Order, Trial, Variant
from ops.bench.machine import describe
from ops.bench.outcome import Report
from ops.bench.paired import Figure, Goal
from schemas.settings import Settings
from trainer.release.registration import code_revision
from trainer.replay.learning_curve import curve, length, tokens_to
from trainer.replay.learning_curve import final as final_length

Say = Callable[[str], None]

GOAL_TOKENS = 80_000
"""Tokens of the mixed stream within which the base should be at an accepted tokens per step of 1."""

QUICK_TOKENS = 12_000
QUICK_SEEDS = 2


@dataclass(frozen=True, slots=True)
class Options:
    """What to run."""

    quick: bool = False
    only: tuple[str, ...] = ()
    seeds: int = 3
    tokens: int | None = None
    """Of the recorded traffic; all where None."""
    processes: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """All seeds of one variant on one order of the stream."""

    variant: Variant
    order: Order
    seeds: tuple[Learned, ...]

    def each(self, figure: Callable[[Learned], float]) -> list[float]:
        """A figure of every seed."""
        return [figure(learned) for learned in self.seeds]

    def tokens_to(self, level: float) -> list[int | None]:
        """Of every seed, the tokens of traffic until its curve is at the level."""
        return [tokens_to(curve(learned.points), level) for learned in self.seeds]

    @property
    def shifts(self) -> list[list[Shift]]:
        """Of every seed, its changes of domain."""
        return [figures.shifts(learned.points) for learned in self.seeds]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """A variant beside the one that it is compared with, seed by seed."""

    runs: Runs
    against: Runs

    @property
    def overall(self) -> Interval:
        """Difference of the accepted tokens per step over the whole stream."""
        return paired(self.runs.each(overall), self.against.each(overall))

    @property
    def final(self) -> Interval:
        """Difference of the accepted tokens per step at the end of the stream."""
        return paired(self.runs.each(final), self.against.each(final))


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """Everything that was run."""

    machine: dict[str, Any]
    code: str
    traffic: Traffic
    runs: tuple[Runs, ...]

    def find(self, name: str, order: Order) -> Runs | None:
        """The runs of a variant on an order of the stream."""
        return next((r for r in self.runs if (r.variant.name, r.order) == (name, order)), None)

    @property
    def comparisons(self) -> list[Comparison]:
        """Every variant that is not its own measure."""
        pairs = [(r, self.find(r.variant.against, r.order)) for r in self.runs if r.variant.against != r.variant.name]
        return [Comparison(one, other) for one, other in pairs if other is not None]

    def report(self) -> Report:
        """The base's figures, with those of every variant beside them."""
        mixed = self.find("base", "mixed")
        assert mixed is not None, "every plan holds the base"
        about = {
            "traffic": {
                "requests": len(self.traffic.asked),
                "tokens": self.traffic.tokens,
                "answered": sum(asked.answered for asked in self.traffic.asked),
                "digest": self.traffic.digest,
            },
            "variants": [_summary(r, self.find(r.variant.against, r.order)) for r in self.runs],
        }
        ordered = self.find("base", "ordered")
        found = (*_mixed_figures(mixed), *(_ordered_figures(ordered) if ordered else ()))
        return Report("Learning from traffic", self.machine, self.code, about, found)


def run(settings: Settings, options: Options, say: Say) -> Study:
    """Run what was not run before, and put it together.

    Raises:
        UserError: no traffic is recorded, or from another target; or no such variant.
    """
    tokens, seeds = options.tokens, options.seeds
    only = options.only
    if options.quick:
        tokens, seeds, only = tokens or QUICK_TOKENS, min(seeds, QUICK_SEEDS), only or variants.QUICK
    plan = variants.chosen(only)
    wanted = [(variant, order) for variant in plan for order in variant.orders]
    trials = [Trial(variant, order, seed) for seed in range(seeds) for variant, order in wanted]
    read, learned = runs.run(settings, trials, tokens, options.processes, say)
    return Study(
        describe(settings.train.num_threads),
        code_revision(),
        read,
        tuple(
            Runs(variant, order, tuple(learned[Trial(variant, order, seed)] for seed in range(seeds)))
            for variant, order in wanted
        ),
    )


def overall(learned: Learned) -> float:
    """Accepted tokens per step over the whole stream: how much was gained while it learned."""
    return length(learned.points)


def final(learned: Learned) -> float:
    """Accepted tokens per step at the end of the stream."""
    return final_length(learned.points)


def over_static(learned: Learned) -> float:
    """Tokens of a verify step over those of the frozen draft, after the first domain."""
    return figures.over_static(learned.points)


def median_reached(values: Sequence[float | None]) -> float | None:
    """The median where more than half of the seeds got there; those that did not count as later than all others."""
    reached = sorted(value for value in values if value is not None)
    middle = median([*reached, *[float("inf")] * (len(values) - len(reached))])
    return None if middle == float("inf") else middle


def _mixed_figures(mixed: Runs) -> list[Figure]:
    found = []
    for level in LEVELS:
        tokens = mixed.tokens_to(level)
        goal = Goal(GOAL_TOKENS, at_least=False) if level == 1 else None
        name = f"tokens_to_accepted_per_step_{level:.1f}".replace(".", "_")
        answered = [
            None if reached is None else figures.answered_within(learned.points, reached)
            for reached, learned in zip(tokens, mixed.seeds, strict=True)
        ]
        detail = {"seeds": tokens, "answered": median_reached(answered)}
        found.append(Figure(name, median_reached(tokens), "tokens", goal, detail=detail))
    at_goal = [figures.length_at(curve(learned.points), GOAL_TOKENS) for learned in mixed.seeds]
    known = [length for length in at_goal if length is not None]
    found.append(
        Figure(
            f"accepted_per_step_at_{GOAL_TOKENS // 1000}k_tokens",
            median(known) if known else None,
            goal=Goal(1.0, at_least=True),
            detail={"seeds": known} if known else {"why": "the stream is shorter"},
        )
    )
    found.append(
        Figure("final_accepted_per_step", median(mixed.each(final)), detail={"seeds": _told(mixed.each(final))})
    )
    return found


def _ordered_figures(ordered: Runs) -> list[Figure]:
    shifts = [shift for of_seed in ordered.shifts for shift in of_seed]
    if not shifts:
        return []
    recovered = [shift.recovered_after for shift in shifts]
    ratios = ordered.each(over_static)
    told = {"shifts": [[_shift_summary(shift) for shift in of_seed] for of_seed in ordered.shifts]}
    return [
        Figure("adaptive_over_static", median(ratios), detail={"seeds": _told(ratios)}),
        Figure("tokens_to_recover", median_reached(recovered), "tokens", detail=told),
        Figure("drop_at_a_shift", median(shift.drop for shift in shifts)),
    ]


def _summary(runs_: Runs, against: Runs | None) -> dict[str, Any]:
    variant = runs_.variant
    summary: dict[str, Any] = {
        "name": variant.name,
        "order": runs_.order,
        "question": variant.question,
        "changes": dict(variant.changes),
        "lookahead": variant.lookahead,
        "branch_nodes": variant.branch_nodes,
        "seeds": len(runs_.seeds),
        "overall": _spread(runs_.each(overall)),
        "final": _spread(runs_.each(final)),
        "tokens_to": {f"{level:g}": median_reached(runs_.tokens_to(level)) for level in LEVELS},
        "training_tokens_per_s": round(median(runs_.each(figures.training_rate)), 1),
        "seconds": round(fmean(learned.training_s + learned.scoring_s for learned in runs_.seeds), 1),
    }
    if runs_.order == "ordered":
        summary["over_static"] = _spread(runs_.each(over_static))
    if against is not None and against is not runs_:
        comparison = Comparison(runs_, against)
        for name, difference in (("overall", comparison.overall), ("final", comparison.final)):
            summary[f"{name}_difference"] = {**difference.summary(), "clear": difference.is_clear}
        summary["against"] = variant.against
    return summary


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": round(median(values), 4), **interval(values).summary(), "seeds": _told(values)}


def _shift_summary(shift: Shift) -> dict[str, Any]:
    lengths = {name: round(getattr(shift, name), 4) for name in ("before", "after", "drop", "over_static")}
    return {
        "domain": shift.domain,
        **lengths,
        "recovered_after": shift.recovered_after,
        "settled_after": shift.settled_after,
    }


def _told(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
