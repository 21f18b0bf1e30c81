"""The figures of a run of ``aurora bench loop``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ops.bench.harness import Figure, Goal, compare_arms, percentile
from ops.bench.loop.learning_delay import Delays
from ops.bench.loop.node_comparison import ComparisonResult
from ops.bench.loop.two_domain_run import ADAPTIVE, NONE, STATIC, YOUNG_S, LoopRecord
from ops.demo.record import DemoRun, accepted_per_step, edge_rates, split_edges, summarize_run
from ops.loadgen.load import Response

DAY_0_GOAL, SHIFT_GOAL = Goal(1.5, at_least=True), Goal(1.25, at_least=True)
DELAY_GOAL = Goal(60, at_least=False)


def judge(record: LoopRecord) -> tuple[Figure, ...]:
    """Return the figures with their goals."""
    # Without a newer champion there is no static arm: the static draft is the adaptive one.
    static = STATIC if all(STATIC in result.rates for result in record.second) else ADAPTIVE
    run, errors = record.run, [request.error for request in record.run.failed]
    return (
        *_speedups("day0_speedup", record.first, NONE, DAY_0_GOAL),
        _speedup("day0_speedup_while_training", record.training, NONE),
        *_speedups("shift_speedup", record.second, static, SHIFT_GOAL, at_shift=record.at_shift),
        *_speedups("shift_over_none", record.second, NONE),
        *_delay_figures(record.delays),
        *(_acceptance(run, domain) for domain in record.domains),
        Figure("versions_served", len(run.swaps), detail={"registered": len(run.versions)}),
        Figure("failed_requests", len(errors), goal=Goal(0, at_least=False), detail={"errors": errors[:5]}),
    )


def summarize(record: LoopRecord) -> dict[str, Any]:
    """Return the rest of the JSON: the traffic of each domain, and the versions with their times."""
    start, demo = record.run.started, summarize_run(record.run)
    return {
        "traffic": demo["domains"],
        "with_trainer_running_tokens_per_s": {
            domain: _rounded(edge_rates(_of_domain(record.run, domain))[1]) for domain in record.domains
        },
        "at_shift": record.at_shift,
        "swaps": demo["swaps"],
        "versions": [
            {
                "version": version.version,
                "registered_s": _rounded(version.registered - start),
                "served_s": None if version.served is None else _rounded(version.served - start),
                "held_out": _rounded(version.held_out),
                "champion_held_out": _rounded(version.champion_held_out),
            }
            for version in record.run.versions
        ],
        "seconds": demo["duration_s"],
    }


def _speedups(
    name: str, results: Sequence[ComparisonResult], under: str, goal: Goal | None = None, **detail: str | None
) -> Iterator[Figure]:
    """Yield the figure for one request at a time, which has the goal, and for the concurrency of the traffic."""
    for number, result in enumerate(results):
        yield _speedup(f"{name}_loaded" if number else name, result, under, None if number else goal, **detail)


def _speedup(name: str, result: ComparisonResult, under: str, goal: Goal | None = None, **detail: str | None) -> Figure:
    arms = (ADAPTIVE, under)
    compared = {
        "at_once": result.concurrency,
        "accepted_per_step": {arm: _rounded(result.accepted_per_step[arm]) for arm in arms},
        "versions": {arm: list(result.versions[arm]) for arm in arms},
        "same_answers": round(result.same_answers, 3),
    }
    return compare_arms(name, result.rates, ADAPTIVE, under, goal=goal, detail={**compared, **detail})


def _delay_figures(delays: Delays) -> Iterator[Figure]:
    detail = {
        "rows": len(delays.seconds),
        "unserved": delays.unserved,
        f"of_the_last_{YOUNG_S:.0f}_s": delays.young,
    }
    for name, share, goal in (("p50", 0.5, DELAY_GOAL), ("p99", 0.99, None)):
        seconds = percentile(delays.seconds, share) if delays.seconds else None
        yield Figure(f"trace_to_served_{name}_s", seconds, "s", goal, detail=detail)


def _acceptance(run: DemoRun, domain: str) -> Figure:
    """Return the accepted tokens per step of the live traffic at the end of a domain, with those at its start."""
    answered = _of_domain(run, domain).succeeded
    first, last = split_edges(answered)
    detail = {
        "first": _rounded(accepted_per_step(first)),
        "requests": len(last),
        "asked_before": find_repeated(answered)[len(answered) - len(last) :].count(True),
    }
    return Figure(f"accepted_per_step_{domain}", accepted_per_step(last), detail=detail)


def find_repeated(requests: Sequence[Response]) -> list[bool]:
    """Return for each request whether an earlier one had the same prompt, so that its output was trained on."""
    first = {request.prompt: number for number, request in reversed(list(enumerate(requests)))}
    return [first[request.prompt] < number for number, request in enumerate(requests)]


def _of_domain(run: DemoRun, domain: str) -> DemoRun:
    return replace(run, requests=tuple(request for request in run.requests if request.domain == domain))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
