"""What happened in one demo, as frozen records, and the figures that follow from them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

EDGE = 50
"""Requests at the beginning and at the end that are compared."""
ROLLING = 20
"""Requests behind each point of a curve: enough to be calm, few enough that a shift of domain is seen."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One request of the demo's traffic and how it was decoded. Times are Unix seconds."""

    id: str
    domain: str
    started: float
    ended: float
    prompt: str = ""
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    verify_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    speculators: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """The stack at one moment."""

    time: float
    output_tokens: int
    trace_lag: int | None = None
    step: int = 0
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Swap:
    """A version that the node began to serve."""

    version: str
    time: float
    in_flight: int
    pause_ms: float


@dataclass(frozen=True, slots=True)
class Version:
    """A registered speculator version; times are None for what has not happened."""

    version: str
    registered: float
    promoted: float | None = None
    served: float | None = None
    held_out: float | None = None
    """Simulated accepted tokens per step on the held-out set."""
    champion_held_out: float | None = None
    """The same of the version that it had to beat."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the verify steps of this run are."""

    published: int = 0
    """Handed to the publisher."""
    in_table: int = 0
    shed: int = 0
    dead: int = 0

    @property
    def balance(self) -> bool:
        """True when every row is accounted for, exactly."""
        return self.published == self.in_table + self.shed + self.dead


@dataclass(frozen=True, slots=True)
class Lossless:
    """Requests decoded again by the target alone."""

    checked: int = 0
    tokens: int = 0
    mismatches: int = 0
    near_ties: int = 0
    examples: tuple[str, ...] = ()
    """What differed, for the person who has to find out why."""


@dataclass(frozen=True, slots=True)
class Run:
    """Everything the report and the summary are made from."""

    started: float
    ended: float
    requests: tuple[Answered, ...] = ()
    """In the order in which they ended."""
    plain: tuple[Answered, ...] = ()
    """The same traffic without speculation."""
    samples: tuple[Sample, ...] = ()
    swaps: tuple[Swap, ...] = ()
    versions: tuple[Version, ...] = ()
    rows: Rows = field(default_factory=Rows)
    lossless: Lossless = field(default_factory=Lossless)
    crashed: str | None = None
    """Which part died, and the log to read."""
    interrupted: bool = False

    @property
    def succeeded(self) -> tuple[Answered, ...]:
        """Requests that were answered."""
        return tuple(request for request in self.requests if request.error is None)

    @property
    def failed(self) -> tuple[Answered, ...]:
        """Requests that were not, with and without speculation."""
        return tuple(request for request in (*self.requests, *self.plain) if request.error is not None)

    @property
    def domains(self) -> tuple[str, ...]:
        """In the order in which they began."""
        return tuple(dict.fromkeys(request.domain for request in sorted(self.requests, key=lambda r: r.started)))


def accepted_per_step(requests: Sequence[Answered]) -> float | None:
    """Drafted tokens accepted per verify step, the bonus token excluded; None without verify steps."""
    verify_steps = sum(request.verify_steps for request in requests)
    return sum(request.accepted for request in requests) / verify_steps if verify_steps else None


def edges(requests: Sequence[Answered]) -> tuple[Sequence[Answered], Sequence[Answered]]:
    """The first and the last ``EDGE`` requests; the halves of a run too short for both, so that they never overlap."""
    width = min(EDGE, len(requests) // 2)
    return requests[:width], requests[len(requests) - width :]


def rolling_accepted_per_step(requests: Sequence[Answered], width: int = ROLLING) -> list[float]:
    """``accepted_per_step`` of the last ``width`` requests, at each request."""
    return [accepted_per_step(requests[max(0, i + 1 - width) : i + 1]) or 0.0 for i in range(len(requests))]


def tokens_per_s(requests: Sequence[Answered], start: float, end: float) -> float | None:
    """Output tokens per second between two moments; None for an empty span.

    The tokens of a request count as spread evenly over its time, so that one which reaches beyond the span is counted
    by its share in it.
    """
    if end <= start:
        return None
    tokens = 0.0
    for request in requests:
        shared = min(request.ended, end) - max(request.started, start)
        if shared > 0 and request.error is None:
            tokens += request.output_tokens * shared / (request.ended - request.started)
    return tokens / (end - start)


def busy_span(requests: Sequence[Answered]) -> tuple[float, float]:
    """From the first start to the last start: after it fewer requests run than the concurrency says."""
    starts = [request.started for request in requests]
    return (min(starts), max(starts)) if starts else (0.0, 0.0)


def edge_rates(run: Run) -> tuple[float | None, float | None]:
    """Output tokens per second while the first and while the last requests (``edges``) ended."""
    answered = run.succeeded
    first, last = edges(answered)
    if not first:
        return None, None
    start, end = busy_span(answered)
    before_last = answered[-len(last) - 1].ended
    return tokens_per_s(answered, start, min(first[-1].ended, end)), tokens_per_s(answered, before_last, end)


def summary(run: Run) -> dict[str, Any]:
    """The figures of ``summary.json``."""
    answered = run.succeeded
    first, last = edges(answered)
    first_rate, last_rate = edge_rates(run)
    return {
        "requests": len(run.requests),
        "failed_requests": len(run.failed),
        "edge_requests": len(first),
        "accepted_per_step_first_50": _rounded(accepted_per_step(first)),
        "accepted_per_step_last_50": _rounded(accepted_per_step(last)),
        "tokens_per_s_first_50": _rounded(first_rate),
        "tokens_per_s_last_50": _rounded(last_rate),
        "tokens_per_s_no_speculation": _rounded(tokens_per_s(run.plain, *busy_span(run.plain))),
        "versions_registered": len(run.versions),
        "versions_promoted": sum(version.promoted is not None for version in run.versions),
        "swaps": [
            {
                "version": s.version,
                "at_s": round(s.time - run.started, 1),
                "in_flight": s.in_flight,
                "pause_ms": round(s.pause_ms, 1),
            }
            for s in run.swaps
        ],
        "lossless_checked": run.lossless.checked,
        "lossless_tokens": run.lossless.tokens,
        "lossless_mismatches": run.lossless.mismatches,
        "lossless_near_ties": run.lossless.near_ties,
        "lossless_examples": list(run.lossless.examples),
        "rows_published": run.rows.published,
        "rows_in_table": run.rows.in_table,
        "rows_shed": run.rows.shed,
        "rows_dead": run.rows.dead,
        "rows_balance": run.rows.balance,
        "domains": {name: _domain(answered, name) for name in run.domains},
        "duration_s": round(run.ended - run.started, 1),
        "errors": [request.error for request in run.failed][:5],
        "crashed": run.crashed,
        "interrupted": run.interrupted,
    }


def faults(run: Run) -> list[str]:
    """What was wrong with the run, for people; empty when it was sound."""
    if run.interrupted:
        return ["interrupted before its end"]
    told = {
        f"{len(run.failed)} requests failed": bool(run.failed),
        f"{run.lossless.mismatches} mismatches against the target": run.lossless.mismatches > 0,
        "the rows do not add up": not run.rows.balance and run.crashed is None,
        run.crashed or "": run.crashed is not None,
    }
    return [fault for fault, holds in told.items() if holds]


def sound(run: Run) -> bool:
    """True when nothing failed, nothing differed, and every row is accounted for."""
    return not faults(run)


def _domain(answered: Sequence[Answered], name: str) -> dict[str, Any]:
    mine = [request for request in answered if request.domain == name]
    first, last = edges(mine)
    return {
        "requests": len(mine),
        "output_tokens": sum(request.output_tokens for request in mine),
        "accepted_per_step": _rounded(accepted_per_step(mine)),
        "accepted_per_step_first_50": _rounded(accepted_per_step(first)),
        "accepted_per_step_last_50": _rounded(accepted_per_step(last)),
        "tokens_per_s": _rounded(tokens_per_s(answered, *busy_span(mine))),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
