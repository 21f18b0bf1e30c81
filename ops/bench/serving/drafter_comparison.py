"""The drafters side by side: no speculation, the suffix drafter, the speculator, and both of them (``hybrid``).

Every domain has cases by batch size, temperature and draft. Before the cases of a domain, each drafter answers training
prompts of the domain: the corpus then holds these answers, and the planner has measured its drafts. The measured
requests are held out and untraced, so the corpus never holds an answer to a prompt that is measured again.

Requests without speculation run in the engine of the hybrid drafter: two engines differ by where their weights lie in
memory.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean

from ops.bench import prompts
from ops.bench.engines import DrafterName, DriveResult, EnginePool, RequestMode
from ops.bench.harness import Figure, Goal, Selection, compare_arms, run_alternating
from schemas.errors import UserError
from serving.engines.base import Request
from serving.engines.builtin.engine import BuiltinEngine


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """How much is measured."""

    trials: int
    tokens: int
    """Longest output."""
    repetitive_tokens: int
    """Longest output in domains whose answers repeat their prompts, which are several times as long."""
    prompts: int
    """Of a trial; a larger batch has as many as its size."""
    batches: tuple[int, ...]
    kinds: tuple[str, ...]
    """Of ``TEMPERATURES``."""
    warm_up: int
    """Training prompts of a domain that each drafter answers before the cases of one kind."""
    day_0_tokens: int
    """Longest output of the first requests."""


TEMPERATURES = {"greedy": 0.0, "sampled": prompts.SAMPLED}
SINGLE: tuple[DrafterName, ...] = ("suffix", "eagle")
"""Drafters with one source of drafts."""
DRAFTERS: tuple[DrafterName, ...] = (*SINGLE, "hybrid")
FOREIGN_DRAFTS = {"math": "code", "code": "math"}
"""Domains that are also measured with the draft of another domain, and that domain."""
NOTHING_MATCHES = {1: "nothing_matches_penalty", 4: "nothing_matches_penalty_b4"}

_BEST_SINGLE_GOAL = Goal(0.98, at_least=True)
_EAGLE_GOALS = {
    **dict.fromkeys(itertools.product((1, 4), ("sql", "edits", "tools")), Goal(1.15, at_least=True)),
    **dict.fromkeys(itertools.product((1, 4, 8), ("chat",)), Goal(0.98, at_least=True)),
}
"""By batch size and domain."""
_NONE_GOALS = dict.fromkeys([(4, "math"), (4, "code")], Goal(1.45, at_least=True))
_DAY_0_GOALS = {1: Goal(1.25, at_least=True), 4: Goal(1.1, at_least=True)}
_NOTHING_GOAL = Goal(1.02, at_least=False)

_WARM_UP_CONCURRENCY = 4
_DAY_0_REQUESTS = 100
_DAY_0_BLOCKS = 5
_RANDOM_PROMPT_TOKENS = 40
_RANDOM_TEMPERATURE = 1.0
"""Greedy answers to random tokens run into loops, which match."""
_RANDOM_TRIALS = 2
"""Times the plan's trials, because the penalty is small."""


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison of the arms."""

    domain: str
    kind: str
    batch: int
    foreign: bool
    """Whether the draft was trained on another domain."""

    @property
    def goals(self) -> dict[str, Goal | None]:
        """The goal of each figure, by its name."""
        kind = "" if self.kind == "greedy" else f"_{self.kind}"
        name, key = f"b{self.batch}_{self.domain}{kind}", (self.batch, self.domain)
        if self.foreign:
            return {f"hybrid_over_best_single_{name}_foreign": _BEST_SINGLE_GOAL}
        return {
            f"hybrid_over_eagle_{name}": _EAGLE_GOALS.get(key),
            f"hybrid_over_best_single_{name}": _BEST_SINGLE_GOAL,
            f"hybrid_over_none_{name}": _NONE_GOALS.get(key),
        }


def list_cases(plan: ComparisonPlan) -> list[Case]:
    """Return the cases in the order in which they are measured."""
    drafts = [(domain, False) for domain in prompts.ALL_DOMAINS] + [(domain, True) for domain in FOREIGN_DRAFTS]
    return [
        Case(domain, kind, batch, foreign)
        for domain, foreign in drafts
        for kind in plan.kinds
        for batch in plan.batches
    ]


def day_0_names(plan: ComparisonPlan) -> dict[int, str]:
    """Return the name of the figure of the first requests, by batch size."""
    return {batch: f"day0_first_{_DAY_0_REQUESTS}_requests_b{batch}" for batch in _DAY_0_GOALS if batch in plan.batches}


def figure_names(plan: ComparisonPlan) -> list[str]:
    """Return the names of these figures."""
    return [
        *(name for case in list_cases(plan) for name in case.goals),
        *day_0_names(plan).values(),
        *(name for batch, name in NOTHING_MATCHES.items() if batch in plan.batches),
    ]


class DrafterComparison:
    """The engines of the arms, and the figures of the cases."""

    def __init__(self, pool: EnginePool, plan: ComparisonPlan, selected: Selection) -> None:
        self._pool, self._plan, self._selected = pool, plan, selected

    def measure(self) -> Iterator[Figure]:
        """Measure the selected figures."""
        wanted = [case for case in list_cases(self._plan) if any(map(self._selected, case.goals))]
        for (domain, kind, foreign), cases in itertools.groupby(wanted, lambda c: (c.domain, c.kind, c.foreign)):
            yield from self._measure_cases(domain, kind, list(cases), foreign=foreign)
        for batch, name in day_0_names(self._plan).items():
            if self._selected(name):
                yield self._measure_day_0(name, batch)
        for batch, name in NOTHING_MATCHES.items():
            if batch in self._plan.batches and self._selected(name):
                yield self._measure_random_prompts(name, batch)

    def _measure_cases(self, domain: str, kind: str, cases: Sequence[Case], *, foreign: bool) -> Iterator[Figure]:
        draft = self._pool.draft_for(FOREIGN_DRAFTS[domain] if foreign else domain)
        try:
            engines = {drafter: self._start_arm(drafter, draft) for drafter in DRAFTERS}
        except UserError as error:
            goals = {name: goal for case in cases for name, goal in case.goals.items() if self._selected(name)}
            yield from (Figure(name, None, goal=goal, detail={"why": str(error)}) for name, goal in goals.items())
            return
        self._warm_up(engines, domain, kind, foreign=foreign)
        for case in cases:
            yield from self._measure_case(case, engines, draft)

    def _start_arm(self, drafter: DrafterName, draft: str) -> BuiltinEngine:
        engine = self._pool.engine(drafter=drafter)
        if drafter != "suffix" and engine.health().speculator != draft:
            engine.swap(self._pool.load_draft(draft), draft)
        return engine

    def _warm_up(self, engines: Mapping[DrafterName, BuiltinEngine], domain: str, kind: str, *, foreign: bool) -> None:
        """Answer training prompts; each call for a domain has prompts of its own, because the corpus keeps answers."""
        number, size = list(TEMPERATURES).index(kind) + len(TEMPERATURES) * foreign, self._plan.warm_up
        texts = self._pool.training_prompts(domain)[number * size : (number + 1) * size]
        mode = RequestMode(_WARM_UP_CONCURRENCY, TEMPERATURES[kind], trace=True)
        for engine in engines.values():
            self._pool.run(engine, self._requests(texts, domain, mode), _WARM_UP_CONCURRENCY)

    def _measure_case(self, case: Case, engines: Mapping[DrafterName, BuiltinEngine], draft: str) -> Iterator[Figure]:
        texts, size = self._pool.held_out_prompts(case.domain), max(case.batch, self._plan.prompts)
        results: dict[str, list[DriveResult]] = {}

        def run_trial(arm: str, engine: BuiltinEngine, trial: int) -> int:
            mode = RequestMode(case.batch, TEMPERATURES[case.kind], speculate=arm != "none")
            chosen = [texts[(trial * size + i) % len(texts)] for i in range(size)]
            result = self._pool.run(engine, self._requests(chosen, case.domain, mode), case.batch)
            results.setdefault(arm, []).append(result)
            return result.tokens

        arms = {"none": engines["hybrid"], **{str(drafter): engine for drafter, engine in engines.items()}}
        rates = run_alternating({arm: partial(run_trial, arm, arms[arm]) for arm in arms}, self._plan.trials)
        best = max(SINGLE, key=lambda arm: rates[arm].clock.median)
        detail = {
            "speculator": draft,
            "tokens_per_s": {arm: rate.tokens_per_s for arm, rate in rates.items()},
            "accepted_per_step": {arm: round(mean(r.accepted_per_step for r in results[arm]), 3) for arm in arms},
            "by_suffix_alone": round(mean(r.suffix_accepted_per_step for r in results["hybrid"]), 3),
        }
        for name, goal in case.goals.items():
            under = "none" if "over_none" in name else "eagle" if "over_eagle" in name else best
            if self._selected(name):
                yield compare_arms(name, rates, "hybrid", under, goal=goal, detail={**detail, "under": under})

    def _requests(self, texts: Sequence[tuple[int, ...]], label: str, mode: RequestMode) -> list[Request]:
        tokens = self._plan.repetitive_tokens if label in prompts.REPETITIVE else self._plan.tokens
        return [
            replace(self._pool.request(text, mode, seed), max_tokens=tokens, label=label)
            for seed, text in enumerate(texts)
        ]

    def _measure_day_0(self, name: str, batch: int) -> Figure:
        """Measure the first requests of a node without a version and without earlier answers.

        Only the requests with speculation are traced: the corpus would otherwise hold the answers of the other arm.
        """
        mixed = zip(*([(d, text) for text in self._pool.held_out_prompts(d)] for d in prompts.ALL_DOMAINS), strict=True)
        labeled, size = list(itertools.chain(*mixed)), _DAY_0_REQUESTS // _DAY_0_BLOCKS
        engine = self._pool.start_engine("day_0", drafter="hybrid")

        def run_block(block: int, *, speculate: bool) -> int:
            mode = RequestMode(batch, speculate=speculate, trace=speculate)
            requests = [
                replace(self._pool.request(text, mode), max_tokens=self._plan.day_0_tokens, label=domain)
                for domain, text in labeled[block * size : (block + 1) * size]
            ]
            return self._pool.run(engine, requests, batch).tokens

        try:
            first = self._pool.training_prompts(prompts.ALL_DOMAINS[0])[:1]
            self._pool.run(engine, self._requests(first, "", RequestMode(speculate=False)), 1)
            arms = {"hybrid": partial(run_block, speculate=True), "none": partial(run_block, speculate=False)}
            rates = run_alternating(arms, _DAY_0_BLOCKS)
        finally:
            engine.stop()
        return compare_arms(name, rates, "hybrid", "none", goal=_DAY_0_GOALS[batch])

    def _measure_random_prompts(self, name: str, batch: int) -> Figure:
        """Measure the cost of a drafter that finds nothing: sampled answers to random tokens."""
        engine, trials = self._start_arm("hybrid", self._pool.name), _RANDOM_TRIALS * self._plan.trials
        order = random.Random(0)  # noqa: S311  # prompts, not secrets
        texts = [
            tuple(order.randrange(engine.vocabulary) for _ in range(_RANDOM_PROMPT_TOKENS))
            for _ in range(trials * batch + self._plan.warm_up)
        ]

        def run_requests(texts: Sequence[tuple[int, ...]], *, speculate: bool) -> int:
            requests = self._requests(texts, "random", RequestMode(batch, _RANDOM_TEMPERATURE, speculate=speculate))
            return self._pool.run(engine, [replace(r, ignore_eos=True) for r in requests], batch).tokens

        def run_trial(trial: int, *, speculate: bool) -> int:
            return run_requests(texts[trial * batch : (trial + 1) * batch], speculate=speculate)

        arms: dict[str, Callable[[int], int]] = {
            "none": partial(run_trial, speculate=False),
            "hybrid": partial(run_trial, speculate=True),
        }
        run_requests(texts[trials * batch :], speculate=True)
        return compare_arms(name, run_alternating(arms, trials), "none", "hybrid", goal=_NOTHING_GOAL)
