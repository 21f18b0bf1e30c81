"""Record of one demo run, and the figures of ``summary.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ops.loadgen.load import Response

EDGE = 50
"""Number of first and last requests that are compared."""
ROLLING = 20
"""Requests per point of a rolling curve: enough to smooth it, few enough to show a domain shift."""


@dataclass(frozen=True, slots=True)
class StackSample:
    """State of the stack at one moment."""

    time: float
    output_tokens: int
    trace_lag: int | None = None
    step: int = 0
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Swap:
    """Hot swap of a version on the node."""

    version: str
    time: float
    in_flight: int
    pause_ms: float


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """Registered speculator version; a time is None if the event did not happen."""

    version: str
    registered: float
    promoted: float | None = None
    served: float | None = None
    held_out: float | None = None
    """Simulated accepted tokens per step on the held-out set."""
    champion_held_out: float | None = None
    """The same figure of the champion that the version was compared with."""


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Locations of the trace rows of a run. A row is one verify step."""

    published: int = 0
    """Rows that the engine passed to the publisher."""
    in_table: int = 0
    dropped: int = 0
    dead: int = 0

    @property
    def balance(self) -> bool:
        """True if every row is accounted for."""
        return self.published == self.in_table + self.dropped + self.dead


@dataclass(frozen=True, slots=True)
class LosslessResult:
    """Comparison of served tokens with the target's own greedy decoding."""

    checked: int = 0
    tokens: int = 0
    mismatches: int = 0
    near_ties: int = 0
    examples: tuple[str, ...] = ()
    """Descriptions of mismatches, for debugging."""


@dataclass(frozen=True, slots=True)
class DemoRun:
    """Input of the report and of the summary."""

    started: float
    ended: float
    requests: tuple[Response, ...] = ()
    """In the order in which they ended."""
    plain: tuple[Response, ...] = ()
    """The comparison without speculation."""
    samples: tuple[StackSample, ...] = ()
    swaps: tuple[Swap, ...] = ()
    versions: tuple[VersionRecord, ...] = ()
    rows: RowCounts = field(default_factory=RowCounts)
    lossless: LosslessResult = field(default_factory=LosslessResult)
    crashed: str | None = None
    """Part that died, and its log."""
    interrupted: bool = False

    @property
    def succeeded(self) -> tuple[Response, ...]:
        """Successful requests with speculation."""
        return tuple(request for request in self.requests if request.error is None)

    @property
    def failed(self) -> tuple[Response, ...]:
        """Failed requests, with and without speculation."""
        return tuple(request for request in (*self.requests, *self.plain) if request.error is not None)

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains in the order of their first request."""
        return tuple(dict.fromkeys(request.domain for request in sorted(self.requests, key=lambda r: r.started)))


def accepted_per_step(requests: Sequence[Response]) -> float | None:
    """Return the mean accepted tokens per verify step, bonus token excluded; None without verify steps."""
    steps = sum(request.verify_steps for request in requests)
    return sum(request.accepted_tokens for request in requests) / steps if steps else None


def acceptance_length(requests: Sequence[Response]) -> float | None:
    """Return the mean tokens per verify step, bonus token included; None without verify steps."""
    accepted = accepted_per_step(requests)
    return None if accepted is None else 1 + accepted


def split_edges(requests: Sequence[Response]) -> tuple[Sequence[Response], Sequence[Response]]:
    """Return the first and the last ``EDGE`` requests, or the two halves of a shorter run."""
    width = min(EDGE, len(requests) // 2)
    return requests[:width], requests[len(requests) - width :]


def rolling_acceptance_length(requests: Sequence[Response], width: int = ROLLING) -> list[float]:
    """Return at each request the acceptance length of the last ``width`` requests; 1 without verify steps."""
    return [acceptance_length(requests[max(0, i + 1 - width) : i + 1]) or 1.0 for i in range(len(requests))]


def tokens_per_s(requests: Sequence[Response], start: float, end: float) -> float | None:
    """Return output tokens per second between two moments; None for an empty span.

    The tokens of a request are spread evenly over its duration, so a request that exceeds the span counts by its share.
    """
    if end <= start:
        return None
    tokens = 0.0
    for request in requests:
        shared = min(request.ended, end) - max(request.started, start)
        if shared > 0 and request.error is None:
            tokens += request.output_tokens * shared / (request.ended - request.started)
    return tokens / (end - start)


def busy_span(requests: Sequence[Response]) -> tuple[float, float]:
    """Return first and last start. After the last start, fewer requests run than the concurrency allows."""
    starts = [request.started for request in requests]
    return (min(starts), max(starts)) if starts else (0.0, 0.0)


def edge_rates(run: DemoRun) -> tuple[float | None, float | None]:
    """Return output tokens per second while the first and while the last ``EDGE`` requests ended."""
    succeeded = run.succeeded
    first, last = split_edges(succeeded)
    if not first:
        return None, None
    start, end = busy_span(succeeded)
    before_last = succeeded[-len(last) - 1].ended
    return tokens_per_s(succeeded, start, min(first[-1].ended, end)), tokens_per_s(succeeded, before_last, end)


def summarize_run(run: DemoRun) -> dict[str, Any]:
    """Return the figures of ``summary.json``."""
    succeeded = run.succeeded
    first, last = split_edges(succeeded)
    first_rate, last_rate = edge_rates(run)
    return {
        "requests": len(run.requests),
        "failed_requests": len(run.failed),
        "edge_requests": len(first),
        "acceptance_length_first_50": _rounded(acceptance_length(first)),
        "acceptance_length_last_50": _rounded(acceptance_length(last)),
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
        "rows_dropped": run.rows.dropped,
        "rows_dead": run.rows.dead,
        "rows_balance": run.rows.balance,
        "domains": {name: _summarize_domain(succeeded, name) for name in run.domains},
        "duration_s": round(run.ended - run.started, 1),
        "errors": [request.error for request in run.failed][:5],
        "crashed": run.crashed,
        "interrupted": run.interrupted,
    }


def find_faults(run: DemoRun) -> list[str]:
    """Return every reason why the run is not sound; empty for a sound run."""
    if run.interrupted:
        return ["interrupted before its end"]
    faults = {
        f"{len(run.failed)} requests failed": bool(run.failed),
        f"{run.lossless.mismatches} mismatches against the target": run.lossless.mismatches > 0,
        "the rows do not add up": not run.rows.balance and run.crashed is None,
        run.crashed or "": run.crashed is not None,
    }
    return [fault for fault, holds in faults.items() if holds]


def _summarize_domain(succeeded: Sequence[Response], domain: str) -> dict[str, Any]:
    requests = [request for request in succeeded if request.domain == domain]
    first, last = split_edges(requests)
    return {
        "requests": len(requests),
        "output_tokens": sum(request.output_tokens for request in requests),
        "acceptance_length": _rounded(acceptance_length(requests)),
        "acceptance_length_first_50": _rounded(acceptance_length(first)),
        "acceptance_length_last_50": _rounded(acceptance_length(last)),
        "tokens_per_s": _rounded(tokens_per_s(succeeded, *busy_span(requests))),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
