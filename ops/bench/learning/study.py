"""The study: every variant over the same recorded traffic with the same seeds, compared seed by seed.

A seed draws the random weights, the order of the stream, and the replayed samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from ops.bench.harness import Figure, Goal, Report, Say, Session
from ops.bench.learning.day_0 import measure_day_0
from ops.bench.learning.learning_figures import (
    LEVELS,
    SeedInterval,
    Shift,
    count_output_tokens,
    find_shifts,
    level_at,
    mean_interval,
    mean_of_hybrid,
    median_reached,
    paired_interval,
    ratio_to_static,
)
from ops.bench.learning.long_requests import LongRequestPlan, measure
from ops.bench.learning.recorded_traffic import GREEDY, SAMPLED, RecordedTraffic, read_traffic
from ops.bench.learning.trials import TrialResult, run_trials
from ops.bench.learning.variants import QUICK_VARIANTS, LearningTrial, Order, Variant, select_variants
from schemas.settings import Settings
from trainer.replay.learning_curve import (
    final_accepted_per_step,
    learning_curve,
    mean_accepted_per_step,
    tokens_to_level,
)

GOAL_TOKENS = 80_000
"""Tokens of the mixed stream within which the base should have 1 accepted token per step."""
QUICK_TOKENS = 12_000
QUICK_SEEDS = 2
LONG_REQUESTS = 48
QUICK_LONG_REQUESTS = 12


@dataclass(frozen=True, slots=True, eq=False)
class VariantRuns:
    """All seeds of one variant on one order of the stream."""

    variant: Variant
    order: Order
    seeds: tuple[TrialResult, ...]

    @property
    def overall(self) -> list[float]:
        """Accepted tokens per step of every seed over the whole stream: how much was gained while learning."""
        return [mean_accepted_per_step(result.scores) for result in self.seeds]

    @property
    def final(self) -> list[float]:
        """Accepted tokens per step of every seed at the end of the stream."""
        return [final_accepted_per_step(result.scores) for result in self.seeds]

    @property
    def hybrid(self) -> list[float]:
        """Accepted tokens per step of every seed over the whole stream, with the suffix drafter's in the same tree."""
        return [mean_of_hybrid(result.scores) for result in self.seeds]

    @property
    def over_static(self) -> list[float]:
        """Tokens per verify step of every seed over those of the frozen draft, after the first domain."""
        return [ratio_to_static(result.scores) for result in self.seeds]

    def tokens_to(self, level: float) -> list[int | None]:
        """Return the tokens of traffic until the curve of every seed reaches the level."""
        return [tokens_to_level(learning_curve(result.scores), level) for result in self.seeds]

    @property
    def shifts(self) -> list[list[Shift]]:
        """The changes of domain of every seed."""
        return [find_shifts(result.scores) for result in self.seeds]


@dataclass(frozen=True, slots=True, eq=False)
class VariantComparison:
    """A variant beside the one that it is compared with."""

    runs: VariantRuns
    against: VariantRuns

    @property
    def overall(self) -> SeedInterval:
        """Difference of the accepted tokens per step over the whole stream."""
        return paired_interval(self.runs.overall, self.against.overall)

    @property
    def hybrid(self) -> SeedInterval:
        """Difference of the accepted tokens per step with the suffix drafter's in the same tree."""
        return paired_interval(self.runs.hybrid, self.against.hybrid)

    @property
    def final(self) -> SeedInterval:
        """Difference of the accepted tokens per step at the end of the stream."""
        return paired_interval(self.runs.final, self.against.final)


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """All trials of a run."""

    session: Session
    traffic: RecordedTraffic
    runs: tuple[VariantRuns, ...]
    day_0: Figure | None = None
    """None in a small plan."""
    long_requests: Figure | None = None
    """None where a selection of variants was asked for."""

    def find(self, name: str, order: Order) -> VariantRuns | None:
        """Return the runs of a variant on an order of the stream."""
        return next((r for r in self.runs if (r.variant.name, r.order) == (name, order)), None)

    @property
    def base(self) -> VariantRuns:
        """The base on the mixed stream, or in recorded order: every plan begins with it."""
        return self.runs[0]

    def compare(self, runs: VariantRuns) -> VariantComparison | None:
        """Compare a variant with the one that it names; None if that is the variant itself."""
        against = self.find(runs.variant.against, runs.order)
        return None if against is None or against is runs else VariantComparison(runs, against)

    def report(self) -> Report:
        """Report the figures of the base, and every variant beside them."""
        about = {
            "traffic": {
                "order": self.base.order,
                "requests": len(self.traffic.requests),
                "tokens": self.traffic.tokens,
                "answered": sum(request.output_tokens for request in self.traffic.requests),
                "digest": self.traffic.digest,
            },
            "variants": [_summarize(runs, self.compare(runs)) for runs in self.runs],
        }
        ordered = self.find("base", "ordered")
        others = filter(None, (self.day_0, self.long_requests))
        figures = (*_base_figures(self.base), *(_ordered_figures(ordered) if ordered else ()), *others)
        return self.session.report("Learning from traffic", about, figures)


def run(
    settings: Settings,
    say: Say,
    *,
    quick: bool = False,
    only: tuple[str, ...] = (),
    seeds: int = 3,
    tokens: int | None = None,
    processes: int = 1,
    sampled: bool = False,
) -> Study:
    """Run the trials without a result, and collect all.

    Args:
        settings: Target, recordings, and everything that variants do not change.
        say: Reports progress.
        quick: Run fewer variants and seeds over less traffic.
        only: Variants whose names begin with one of these; all if empty.
        seeds: Trials of each variant.
        tokens: Tokens of the recorded traffic to use; all if None.
        processes: Number of parallel trials.
        sampled: Use the sampled recording, in recorded order, and measure nothing else.
    """
    session, is_whole = Session(settings.train.num_threads), not only
    if quick:
        tokens, seeds, only = tokens or QUICK_TOKENS, min(seeds, QUICK_SEEDS), only or QUICK_VARIANTS
    orders: tuple[Order, ...] = ("recorded",) if sampled else ()
    wanted = [(variant, order) for variant in select_variants(only) for order in orders or variant.orders]
    trials = [LearningTrial(variant, order, seed) for seed in range(seeds) for variant, order in wanted]
    traffic, results = run_trials(settings, trials, tokens, processes, say, SAMPLED if sampled else GREEDY)
    runs = (
        VariantRuns(variant, order, tuple(results[LearningTrial(variant, order, seed)] for seed in range(seeds)))
        for variant, order in wanted
    )
    day_0 = None if quick or sampled else measure_day_0(settings, traffic, say)
    plan = LongRequestPlan(QUICK_LONG_REQUESTS if quick else LONG_REQUESTS)
    long_requests = measure(settings, traffic, plan, say) if is_whole and not sampled else None
    return Study(session, traffic, tuple(runs), day_0, long_requests)


def run_long_requests(settings: Settings, say: Say, requests: int) -> Report:
    """Serve and score so many long requests, without any trial."""
    session = Session(settings.train.num_threads)
    figure = measure(settings, read_traffic(settings), LongRequestPlan(requests), say)
    return session.report("Long requests", {}, [figure])


def _base_figures(base: VariantRuns) -> Iterator[Figure]:
    for level in LEVELS:
        tokens = base.tokens_to(level)
        answered = [
            None if reached is None else count_output_tokens(result.scores, reached)
            for reached, result in zip(tokens, base.seeds, strict=True)
        ]
        name = f"tokens_to_accepted_per_step_{level:.1f}".replace(".", "_")
        goal = Goal(GOAL_TOKENS, at_least=False) if level == 1 else None
        detail = {"seeds": tokens, "answered": median_reached(answered)}
        yield Figure(name, median_reached(tokens), "tokens", goal, detail=detail)
    levels = [level_at(learning_curve(result.scores), GOAL_TOKENS) for result in base.seeds]
    known = [level for level in levels if level is not None]
    yield Figure(
        f"accepted_per_step_at_{GOAL_TOKENS // 1000}k_tokens",
        median(known) if known else None,
        goal=Goal(1.0, at_least=True),
        detail={"seeds": known} if known else {"why": "the stream is shorter"},
    )
    yield Figure("final_accepted_per_step", median(base.final), detail={"seeds": _rounded(base.final)})


def _ordered_figures(ordered: VariantRuns) -> Iterator[Figure]:
    shifts = [shift for of_seed in ordered.shifts for shift in of_seed]
    if not shifts:
        return
    ratios = ordered.over_static
    yield Figure("adaptive_over_static", median(ratios), detail={"seeds": _rounded(ratios)})
    recovered = median_reached([shift.recovered_after for shift in shifts])
    detail = {"shifts": [[shift.summary() for shift in of_seed] for of_seed in ordered.shifts]}
    yield Figure("tokens_to_recover", recovered, "tokens", detail=detail)
    yield Figure("drop_at_a_shift", median(shift.drop for shift in shifts))


def _summarize(runs: VariantRuns, comparison: VariantComparison | None) -> dict[str, Any]:
    variant = runs.variant
    summary: dict[str, Any] = {
        "name": variant.name,
        "order": runs.order,
        "question": variant.question,
        "changes": dict(variant.changes),
        "lookahead": variant.lookahead,
        "branch_nodes": variant.branch_nodes,
        "seeds": len(runs.seeds),
        "overall": _spread(runs.overall),
        "final": _spread(runs.final),
        "hybrid": _spread(runs.hybrid),
        "tokens_to": {f"{level:g}": median_reached(runs.tokens_to(level)) for level in LEVELS},
        "training_tokens_per_s": round(median(result.training_tokens_per_s for result in runs.seeds), 1),
        "seconds": round(fmean(result.training_s + result.scoring_s for result in runs.seeds), 1),
    }
    if runs.order == "ordered":
        summary["over_static"] = _spread(runs.over_static)
    if comparison is not None:
        differences = ("overall", comparison.overall), ("final", comparison.final), ("hybrid", comparison.hybrid)
        for name, difference in differences:
            summary[f"{name}_difference"] = {**difference.summary(), "clear": difference.is_clear}
        summary["against"] = variant.against
    return summary


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": round(median(values), 4), **mean_interval(values).summary(), "seeds": _rounded(values)}


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
