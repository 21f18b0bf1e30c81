"""``aurora bench update``: how often a node should update to newer versions.

A draft learns from recorded traffic, once with the domains mixed and once one after the other, and becomes a version
after each block of requests. The cost of an update is measured on a running engine. From both, the serving of the whole
traffic is computed for every interval between updates, and for ``auto`` with the node's own update policy.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib as mpl
import torch

from ops.bench.engines import EnginePool
from ops.bench.harness import Figure, Goal, Report, Say, Session
from ops.bench.learning.recorded_traffic import RecordedTraffic, read_traffic
from ops.bench.learning.trials import order_stream
from ops.bench.learning.variants import LOOKAHEAD, PLAN, LearningTrial, Order, trial_settings
from ops.report.page import format_number, render_page, write_page
from ops.report.theme import MUTED, OTHERS, SERIES, chart_style, new_figure, render_svg
from schemas.errors import UserError
from schemas.settings import Settings, Update
from schemas.speculator import checkpoint
from schemas.speculator.network import EagleDraft
from serving.engines.builtin.engine import BuiltinEngine
from serving.versions.update_policy import CounterReading, UpdatePolicy
from trainer.data.target import read_target
from trainer.objective.simulated_acceptance import simulate_acceptance
from trainer.replay.prequential import PrequentialRun

Acceptance = Callable[[int, int], float]
"""Accepted tokens per step of a version on a block of the traffic; version ``b`` was trained on the blocks before."""

ORDERS: tuple[Order, ...] = ("ordered", "mixed")
CONCURRENCY = 4
_OUTPUT_TOKENS = 24
_APART_S = 1.5
"""Between two updates: the time over which the usual output is measured."""
_TITLES: Mapping[Order, str] = {"mixed": "Domains mixed", "ordered": "One domain after the other"}


def run(settings: Settings, say: Say, *, quick: bool, tokens: int | None, html: Path | None) -> Report:
    """Learn, measure, and compute."""
    if html:
        write_page("--html", html, "")
    traffic = read_traffic(settings, tokens or (8_000 if quick else 50_000))
    session, blocks, updates = Session(settings.serve.num_threads), 12 if quick else 24, 5 if quick else 15
    versions = {order: BlockVersions(settings, traffic, order, blocks, say) for order in ORDERS}
    say(f"updating {updates} times on an engine with {CONCURRENCY} requests at a time")
    pool = EnginePool(settings, name="", domain="math", max_tokens=_OUTPUT_TOKENS, say=say)
    costs = measure_costs(pool, versions["mixed"].newest, updates)
    say("computing the serving of the traffic by every policy")
    outcomes = {
        order: sweep_policies(trained.output_tokens, trained.accepted_per_step, costs, settings.update)
        for order, trained in versions.items()
    }
    about = {
        "traffic": {"requests": len(traffic.requests), "tokens": traffic.tokens, "digest": traffic.digest},
        "versions": len(versions["mixed"].output_tokens),
        "at_once": CONCURRENCY,
        "verify_step_ms": round(costs.verify_step_s * 1e3, 2),
        "frontier": {order: [describe_outcome(o, found[0]) for o in found] for order, found in outcomes.items()},
    }
    figures = chain(judge_costs(costs), *(judge_policies(order, found) for order, found in outcomes.items()))
    report = session.report("How often to update to newer versions", about, figures)
    if html:
        write_page("--html", html, render_update_page(outcomes, report))
    return report


class BlockVersions:
    """Blocks of traffic in order; version ``b`` was trained on the blocks before ``b``, version 0 is random."""

    def __init__(self, settings: Settings, traffic: RecordedTraffic, order: Order, blocks: int, say: Say) -> None:
        """Train on all but the last block; takes as long as a trainer would."""
        trial = LearningTrial(next(variant for variant in PLAN if variant.name == "base"), order, 0)
        settings = trial_settings(settings, trial)
        torch.set_num_threads(settings.train.num_threads)
        torch.manual_seed(trial.seed)
        stream = order_stream(traffic, order, trial.seed)
        size = -(-len(stream) // blocks)
        self._blocks = [stream[start : start + size] for start in range(0, len(stream), size)]
        self._embeddings = (target := read_target(settings)).embeddings_VH
        self._accepted: dict[tuple[int, int], float] = {}
        run = PrequentialRun(target.new_draft(), self._embeddings, settings.train, seed=trial.seed, lookahead=LOOKAHEAD)
        self._versions: list[EagleDraft] = [copy.deepcopy(run.export_draft())]
        for number, block in enumerate(self._blocks[:-1], start=1):
            for start in range(0, len(block), run.new_per_step):
                run.train(block[start : start + run.new_per_step])
            self._versions.append(copy.deepcopy(run.export_draft()))
            say(f"{order} traffic: trained on block {number} of {len(self._blocks) - 1}")

    @property
    def output_tokens(self) -> list[int]:
        """Output tokens of each block."""
        return [sum(request.output_tokens for request in block) for block in self._blocks]

    @property
    def newest(self) -> EagleDraft:
        """The last version."""
        return self._versions[-1]

    def accepted_per_step(self, version: int, block: int) -> float:
        """Simulate a version on a block with greedy chains; each pair is simulated once."""
        if (version, block) not in self._accepted:
            samples = self._blocks[block]
            simulated = simulate_acceptance(self._versions[version], self._embeddings, samples, LOOKAHEAD)
            self._accepted[version, block] = simulated.accepted_per_step
        return self._accepted[version, block]


@dataclass(frozen=True, slots=True)
class UpdateCosts:
    """The costs of serving on this machine, in seconds."""

    verify_step_s: float
    """Of one request: its share of the batch's time."""
    pause_s: float
    """Of a swap."""
    fetch_s: float
    """Serving time that reading and checking a version takes from the verify steps."""

    @property
    def update_s(self) -> float:
        """Serving time that an update costs."""
        return self.pause_s + self.fetch_s


class OutputSpan(NamedTuple):
    """Output tokens of a span of time."""

    tokens: int
    seconds: float


class MeasuredUpdate(NamedTuple):
    """The pause of a swap, the output just before the update, and while the version was read and checked."""

    pause_s: float
    before: OutputSpan
    during: OutputSpan


def measure_costs(pool: EnginePool, draft: EagleDraft, updates: int) -> UpdateCosts:
    """Measure updates to a draft under load: the median pause, and the mean cost of reading and checking."""
    engine = pool.start_engine("random", length=4)
    try:
        with tempfile.TemporaryDirectory(prefix="aurora-bench-") as folder:
            version = Path(folder) / "version"
            checkpoint.write_checkpoint(draft, version, engine.target)
            with pool.under_load(engine, CONCURRENCY) as results:
                measured = [_update(engine, version) for _ in range(updates)]
    finally:
        engine.stop()
    (result,) = results
    if result.failed:
        raise UserError(f"{result.failed} of {len(result.outputs)} requests failed: {engine.health().error}")
    pause_s = median(update.pause_s for update in measured)
    return UpdateCosts(result.seconds / result.verify_steps, pause_s, fetch_cost(measured))


def fetch_cost(updates: Sequence[MeasuredUpdate]) -> float:
    """Return the serving seconds that reading and checking a version takes from the verify steps.

    The output of a short span varies by a few verify steps: all spans are added up before they are compared.
    """
    before, during = (
        OutputSpan(sum(span.tokens for span in spans), sum(span.seconds for span in spans))
        for spans in ([update.before for update in updates], [update.during for update in updates])
    )
    share = 1 - (during.tokens / during.seconds) / (max(before.tokens, 1) / before.seconds)
    return max(share, 0.0) * during.seconds / len(updates)


def _update(engine: BuiltinEngine, version: Path) -> MeasuredUpdate:
    def output_since(tokens: int, started: float) -> OutputSpan:
        return OutputSpan(engine.health().output_tokens - tokens, time.perf_counter() - started)

    idle = engine.health().output_tokens, time.perf_counter()
    time.sleep(_APART_S)
    before = output_since(*idle)
    fetching = engine.health().output_tokens, time.perf_counter()
    draft = checkpoint.read_checkpoint(version, engine.line)
    engine.check(draft)
    during = output_since(*fetching)
    return MeasuredUpdate(engine.swap(draft, "bench").pause_ms / 1e3, before, during)


@dataclass(frozen=True, slots=True)
class PolicyOutcome:
    """The serving of the whole traffic by one policy."""

    name: str
    interval_s: float
    """The setting, or the last interval of ``auto``."""
    updates: int
    accepted: float
    """Accepted tokens."""
    serving_s: float
    """Updates included."""
    updating_s: float

    @property
    def overhead(self) -> float:
        """Share of the serving time that updates took."""
        return self.updating_s / self.serving_s

    def accepted_share(self, every: PolicyOutcome) -> float:
        """Return the accepted tokens over those of a node that updates to every version."""
        return self.accepted / every.accepted if every.accepted else 1.0

    def output_share(self, every: PolicyOutcome) -> float:
        """Return the output per second over that of a node that updates to every version at no cost."""
        return (every.serving_s - every.updating_s) / self.serving_s


def simulate_policy(
    name: str, update: Update, output_tokens: Sequence[int], acceptance: Acceptance, costs: UpdateCosts
) -> PolicyOutcome:
    """Serve blocks of so many output tokens, each by the version that is active at its start."""
    policy, now, active, behind_since = UpdatePolicy(update, name), 0.0, 0, None
    steps = accepted = updating_s = 0.0
    updates = 0

    def reading() -> CounterReading:
        return CounterReading(now, round(steps), round(accepted), round(steps + accepted))

    for newest, tokens in enumerate(output_tokens):
        policy.record_reading(reading())
        if newest > active:
            behind_since = now if behind_since is None else behind_since
            if now >= policy.due_at(str(newest), behind_since):
                now += costs.update_s
                updating_s += costs.update_s
                policy.record_swap()
                policy.record_update(reading(), reading(), costs.update_s)
                active, behind_since, updates = newest, None, updates + 1
                policy.record_reading(reading())
        block_steps = tokens / (1 + acceptance(active, newest))
        steps, accepted = steps + block_steps, accepted + tokens - block_steps
        now += block_steps * costs.verify_step_s
    return PolicyOutcome(name, policy.interval_s, updates, accepted, now, updating_s)


def sweep_policies(
    output_tokens: Sequence[int], acceptance: Acceptance, costs: UpdateCosts, auto: Update
) -> list[PolicyOutcome]:
    """Simulate updates to every version, to fewer and fewer of them, to none, and ``auto``."""

    def simulate(name: str, update: Update) -> PolicyOutcome:
        return simulate_policy(name, update, output_tokens, acceptance, costs)

    outcomes = [every := simulate("every version", Update(min_interval=0, jitter=0))]
    period_s = every.serving_s / len(output_tokens)
    factor = 2
    while factor < len(output_tokens):
        # Half a period less than a multiple of it, so that blocks of other lengths do not miss their update.
        interval_s = round((factor - 0.5) * period_s, 1)
        fixed = Update(min_interval=interval_s, jitter=0, max_staleness=every.serving_s * len(output_tokens))
        outcomes.append(simulate(f"at most every {interval_s:g} s", fixed))
        factor *= 2
    steps = sum(tokens / (1 + acceptance(0, block)) for block, tokens in enumerate(output_tokens))
    never = PolicyOutcome("never", float("inf"), 0, sum(output_tokens) - steps, steps * costs.verify_step_s, 0.0)
    return [*outcomes, never, simulate("auto", auto.model_copy(update={"min_interval": "auto", "jitter": 0.0}))]


def describe_outcome(outcome: PolicyOutcome, every: PolicyOutcome) -> dict[str, Any]:
    """Return one point of the frontier, as JSON."""
    return {
        "policy": outcome.name,
        "interval_s": None if outcome.name == "never" else round(outcome.interval_s, 1),
        "updates": outcome.updates,
        "seconds": round(outcome.serving_s, 1),
        "overhead": round(outcome.overhead, 6),
        "accepted_tokens_kept": round(outcome.accepted_share(every), 4),
        "output_over_free_following": round(outcome.output_share(every), 4),
    }


def judge_costs(costs: UpdateCosts) -> list[Figure]:
    """Return the figures of one update."""
    return [Figure("swap_pause", costs.pause_s * 1e3, "ms"), Figure("fetch_cost", costs.fetch_s * 1e3, "ms")]


def judge_policies(order: Order, outcomes: Sequence[PolicyOutcome]) -> Iterator[Figure]:
    """Return the figures of one order of the traffic."""
    every, never, auto, fixed = outcomes[0], outcomes[-2], outcomes[-1], outcomes[:-1]
    best = max(fixed, key=lambda outcome: outcome.output_share(every))
    close = [outcome for outcome in fixed if outcome.accepted_share(every) >= 0.95]
    longest = max(close, key=lambda outcome: outcome.interval_s)
    yield Figure(f"{order}_interval_that_keeps_95_percent", longest.interval_s, "s")
    yield Figure(f"{order}_never_keeps", never.accepted_share(every))
    detail: Mapping[str, Any] = {"overhead": round(auto.overhead, 6)}
    yield Figure(f"{order}_auto_keeps", auto.accepted_share(every), detail=detail)
    ratio, goal = auto.output_share(every) / best.output_share(every), Goal(0.98, at_least=True)
    detail = {"best": best.name, "auto_interval_s": round(auto.interval_s, 1)}
    yield Figure(f"{order}_auto_vs_best_fixed", ratio, goal=goal, detail=detail)


def render_update_page(outcomes: Mapping[Order, Sequence[PolicyOutcome]], report: Report) -> str:
    """Return the page of a run."""
    figures = {figure.name: figure for figure in report.figures}
    headline = {
        "swap_pause": "ms for which the verify steps pause at a swap",
        "fetch_cost": "ms of serving that reading and checking a version costs",
        **{f"{order}_auto_keeps": f"of the accepted tokens that auto keeps on {order} traffic" for order in outcomes},
    }
    return render_page(
        Path(__file__).with_name("update.html"),
        subtitle="{requests} recorded requests, {tokens} tokens".format_map(report.about["traffic"]),
        headline_figures=[(format_number(figures[name].value), text) for name, text in headline.items()],
        sections=[
            {"title": _TITLES[order], "chart": frontier_chart(order, found), "rows": _rows(found)}
            for order, found in outcomes.items()
        ],
        machine="{processor}, {cores} cores.".format_map(report.machine),
    )


def frontier_chart(name: str, outcomes: Sequence[PolicyOutcome]) -> str:
    """Draw the accepted tokens over the overhead: fixed intervals as a line, ``auto`` as a diamond."""
    every, fixed, auto = outcomes[0], sorted(outcomes[:-1], key=lambda o: o.overhead), outcomes[-1]
    with mpl.rc_context(chart_style(name)):
        figure, axes = new_figure(3.5)
        shares = [o.accepted_share(every) * 100 for o in fixed]
        axes.plot([o.overhead * 100 for o in fixed], shares, "o-", color=SERIES)
        axes.plot([auto.overhead * 100], [auto.accepted_share(every) * 100], "D", color=OTHERS[0], markersize=9)
        for outcome in outcomes:
            place = (outcome.overhead * 100, outcome.accepted_share(every) * 100)
            axes.annotate(outcome.name, place, (6, -12), textcoords="offset points", color=MUTED, fontsize=9)
        axes.set_xlabel("share of serving time spent on updates, %", color=MUTED)
        axes.set_ylabel("accepted tokens kept, %")
        axes.set_ylim(0, 105)
        return render_svg(figure)


def _rows(outcomes: Sequence[PolicyOutcome]) -> list[tuple[str, ...]]:
    every = outcomes[0]
    return [
        (o.name, str(o.updates), f"{o.overhead:.3%}", f"{o.accepted_share(every):.1%}", f"{o.output_share(every):.1%}")
        for o in outcomes
    ]
