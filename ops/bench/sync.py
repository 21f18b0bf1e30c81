"""``aurora bench sync``: how often a node should take newer versions over.

A draft learns from recorded traffic, once with the domains mixed and once one after the other, and every so many
requests it becomes a version. What a takeover costs is measured on a running engine. With both, the serving of the
whole traffic is computed for every interval between takeovers, and for ``auto`` with the node's own policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ops.bench import machine
from ops.bench.learning import traffic
from ops.bench.learning.variants import Order
from ops.bench.outcome import Report
from ops.bench.paired import Figure, Goal
from ops.bench.stand import QUICK, Stand
from ops.bench.sync_costs import AT_ONCE, measured
from ops.bench.sync_course import Course
from ops.bench.sync_page import page
from ops.bench.sync_policies import Costs, Outcome, kept, net, swept
from ops.report.writing import write_page
from schemas.settings import Settings
from trainer.release.registration import code_revision

Say = Callable[[str], None]
ORDERS: tuple[Order, ...] = ("ordered", "mixed")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    quick: bool = False
    tokens: int | None = None
    html: Path | None = None

    @property
    def traffic_tokens(self) -> int:
        """Of the recording, prompts included."""
        return self.tokens or (8_000 if self.quick else 50_000)

    @property
    def blocks(self) -> int:
        """As many versions, day 0 included."""
        return 12 if self.quick else 24

    @property
    def takeovers(self) -> int:
        """That are measured."""
        return 5 if self.quick else 15


def run(settings: Settings, options: Options, say: Say) -> Report:
    """Learn, measure, and compute.

    Raises:
        UserError: no recorded traffic, no target, or a page that cannot be written.
    """
    if options.html:
        write_page("--html", options.html, "")
    read = traffic.read(settings, options.traffic_tokens)
    described = machine.describe(settings.serve.num_threads)
    courses = {order: Course(settings, read, order, options.blocks, say) for order in ORDERS}
    say(f"taking a version over {options.takeovers} times on an engine that answers {AT_ONCE} requests at a time")
    stand = Stand(settings, QUICK, name="", domain="math", say=say)
    costs = measured(stand, courses["mixed"].newest, options.takeovers)
    say("serving the traffic by every policy")
    found = {order: swept(course.answered, course.length, costs, settings.update) for order, course in courses.items()}
    report = Report(
        "How often to take newer versions over",
        described,
        code_revision(),
        _about(read, len(courses["mixed"].answered), costs, found),
        tuple(chain(_costs(costs), *(_figures(order, outcomes) for order, outcomes in found.items()))),
    )
    if options.html:
        write_page("--html", options.html, page(found, report))
    return report


def _about(read: traffic.Traffic, versions: int, costs: Costs, found: dict[Order, list[Outcome]]) -> dict[str, Any]:
    return {
        "traffic": {"requests": len(read.asked), "tokens": read.tokens, "digest": read.digest},
        "versions": versions,
        "at_once": AT_ONCE,
        "verify_step_ms": round(costs.verify_step_s * 1e3, 2),
        "frontier": {order: [_point(o, outcomes[0]) for o in outcomes] for order, outcomes in found.items()},
    }


def _point(outcome: Outcome, every: Outcome) -> dict[str, Any]:
    return {
        "policy": outcome.name,
        "interval_s": None if outcome.name == "never" else round(outcome.interval_s, 1),
        "takeovers": outcome.takeovers,
        "seconds": round(outcome.serving_s, 1),
        "overhead": round(outcome.overhead, 6),
        "accepted_per_step_kept": round(kept(outcome, every), 4),
        "output_over_free_following": round(net(outcome, every), 4),
    }


def _costs(costs: Costs) -> list[Figure]:
    return [
        Figure("swap_pause", costs.pause_s * 1e3, "ms"),
        Figure("fetch_cost", costs.fetch_s * 1e3, "ms"),
    ]


def _figures(order: Order, outcomes: list[Outcome]) -> list[Figure]:
    every, auto = outcomes[0], outcomes[-1]
    fixed = outcomes[:-1]
    best = max(fixed, key=lambda outcome: net(outcome, every))
    detail = {"best": best.name, "auto_interval_s": round(auto.interval_s, 1)}
    half = [outcome for outcome in fixed if kept(outcome, every) >= 0.95]
    longest = max(half, key=lambda outcome: outcome.interval_s)
    return [
        Figure(f"{order}_interval_that_keeps_95_percent", longest.interval_s, "s"),
        Figure(f"{order}_never_keeps", kept(outcomes[-2], every)),
        Figure(f"{order}_auto_keeps", kept(auto, every), detail={"overhead": round(auto.overhead, 6)}),
        Figure(
            f"{order}_auto_vs_best_fixed",
            net(auto, every) / net(best, every),
            goal=Goal(0.98, at_least=True),
            detail=detail,
        ),
    ]
