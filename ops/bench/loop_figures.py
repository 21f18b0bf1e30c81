"""What a run of ``aurora bench loop`` came to. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ops.bench.harness import Figure, Goal, compare_arms, percentile
from ops.bench.loop_arms import Measured
from ops.bench.loop_course import ADAPTIVE, NONE, STATIC, YOUNG_S, Record
from ops.bench.loop_served import Waits
from ops.demo.record import DemoRun, accepted_per_step, edge_rates, split_edges, summarize_run
from ops.loadgen.load import Response

DAY_0_GOAL, SHIFT_GOAL = Goal(1.5, at_least=True), Goal(1.25, at_least=True)
WAIT_GOAL = Goal(60, at_least=False)


def figures(record: Record) -> tuple[Figure, ...]:
    """The figures with their goals."""
    return (
        *_speeds("day0_speedup", record.first, NONE, DAY_0_GOAL),
        _speed("day0_speedup_while_training", record.training, NONE),
        *_speeds("shift_speedup", record.second, _static(record), SHIFT_GOAL, at_shift=record.at_shift),
        *_speeds("shift_over_none", record.second, NONE),
        *_waited(record.waits),
        *(_learned(record.run, domain) for domain in record.domains),
        Figure("versions_served", len(record.run.swaps), detail={"registered": len(record.run.versions)}),
        _failures(record.run),
    )


def told(record: Record) -> dict[str, Any]:
    """What else there is to know, as JSON: the traffic of each domain, and the versions with their times."""
    start, of_run = record.run.started, summarize_run(record.run)
    return {
        "traffic": of_run["domains"],
        "with_trainer_running_tokens_per_s": {
            domain: _rounded(edge_rates(_of_domain(record.run, domain))[1]) for domain in record.domains
        },
        "at_shift": record.at_shift,
        "swaps": of_run["swaps"],
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
        "seconds": of_run["duration_s"],
    }


def _static(record: Record) -> str:
    """The arm with the draft of the shift: no other than the adaptive one where nothing took its place."""
    return STATIC if all(STATIC in measured.rates for measured in record.second) else ADAPTIVE


def _speeds(
    name: str, measured: tuple[Measured, ...], under: str, goal: Goal | None = None, **detail: str | None
) -> Iterator[Figure]:
    """One request at a time, and with the traffic's concurrency; the goal is for the first."""
    for number, one in enumerate(measured):
        yield _speed(f"{name}_loaded" if number else name, one, under, None if number else goal, **detail)


def _speed(name: str, measured: Measured, under: str, goal: Goal | None = None, **detail: str | None) -> Figure:
    compared = (ADAPTIVE, under)
    return compare_arms(
        name,
        measured.rates,
        ADAPTIVE,
        under,
        goal=goal,
        detail={
            "at_once": measured.at_once,
            "accepted_per_step": {arm: _rounded(measured.accepted_per_steps[arm]) for arm in compared},
            "versions": {arm: list(measured.versions[arm]) for arm in compared},
            "same_answers": round(measured.same_answers, 3),
            **detail,
        },
    )


def _waited(waits: Waits) -> Iterator[Figure]:
    detail: Mapping[str, Any] = {
        "rows": len(waits.seconds),
        "unserved": waits.unserved,
        f"of_the_last_{YOUNG_S:.0f}_s": waits.young,
    }
    for name, share, goal in (("p50", 0.5, WAIT_GOAL), ("p99", 0.99, None)):
        seconds = percentile(waits.seconds, share) if waits.seconds else None
        yield Figure(f"trace_to_served_{name}_s", seconds, "s", goal, detail=detail)


def _learned(run: DemoRun, domain: str) -> Figure:
    """Accepted tokens per step of the live traffic at the end of a domain, with that of its beginning beside it."""
    answered = _of_domain(run, domain).succeeded
    first, last = split_edges(answered)
    detail = {
        "first": _rounded(accepted_per_step(first)),
        "requests": len(last),
        "asked_before": asked_before(answered)[len(answered) - len(last) :].count(True),
    }
    return Figure(f"accepted_per_step_{domain}", accepted_per_step(last), detail=detail)


def asked_before(requests: Sequence[Response]) -> list[bool]:
    """Of each request, whether an earlier one had the same prompt: what it is answered was learned from already."""
    first = {request.prompt: number for number, request in reversed(list(enumerate(requests)))}
    return [first[request.prompt] < number for number, request in enumerate(requests)]


def _failures(run: DemoRun) -> Figure:
    errors = [request.error for request in run.failed]
    return Figure("failed_requests", len(errors), goal=Goal(0, at_least=False), detail={"told": errors[:5]})


def _of_domain(run: DemoRun, domain: str) -> DemoRun:
    mine: tuple[Response, ...] = tuple(request for request in run.requests if request.domain == domain)
    return replace(run, requests=mine)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
