"""Record of one demo run, and the figures of ``summary.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ops.demo.comparison import (
    Trial,
    complete_trials,
    describe_speedup,
    explain_slowdown,
    measure_speedup,
    measure_steps,
    total_rates,
)
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
    """The traced traffic, in the order in which the requests ended; all of it with speculation."""
    first: tuple[Trial, ...] = ()
    """Comparison of the first requests, beside the running trainer. Its speculative blocks are part of ``requests``."""
    measured: tuple[Trial, ...] = ()
    """Comparison at the end, without a trainer, on prompts that were not sent before."""
    other_programs: float | None = None
    """Share of the processors that programs outside of the stack used during ``measured``."""
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
        plain = [response for trial in self.first for response in trial.plain.responses]
        measured = [response for trial in self.measured for response in trial.responses]
        return tuple(request for request in (*self.requests, *plain, *measured) if request.error is not None)

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


def accepted_by_source(requests: Sequence[Response]) -> tuple[float, float] | None:
    """Return the accepted tokens per step of the suffix drafter and of the speculator; None without verify steps.

    A token that both proposed counts for the speculator.
    """
    steps = sum(request.verify_steps for request in requests)
    if not steps:
        return None
    suffix = sum(request.suffix_accepted_tokens for request in requests)
    return suffix / steps, (sum(request.accepted_tokens for request in requests) - suffix) / steps


def split_edges(requests: Sequence[Response]) -> tuple[Sequence[Response], Sequence[Response]]:
    """Return the first and the last ``EDGE`` requests, or the two halves of a shorter run."""
    width = min(EDGE, len(requests) // 2)
    return requests[:width], requests[len(requests) - width :]


def rolling_acceptance_length(requests: Sequence[Response], width: int = ROLLING) -> list[float]:
    """Return at each request the acceptance length of the last ``width`` requests; 1 without verify steps."""
    return [acceptance_length(window) or 1.0 for window in _windows(requests, width)]


def rolling_suffix_length(requests: Sequence[Response], width: int = ROLLING) -> list[float]:
    """Return the same with the accepted tokens of the suffix drafter alone."""
    return [1 + (accepted_by_source(window) or (0.0, 0.0))[0] for window in _windows(requests, width)]


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


def last_rate(requests: Sequence[Response]) -> float | None:
    """Return output tokens per second while the last ``EDGE`` of these successful requests ended."""
    _, last = split_edges(requests)
    if not last:
        return None
    return tokens_per_s(requests, requests[-len(last) - 1].ended, busy_span(requests)[1])


def summarize_run(run: DemoRun) -> dict[str, Any]:
    """Return the figures of ``summary.json``."""
    succeeded = run.succeeded
    first, last = split_edges(succeeded)
    speedup, first_rates = measure_speedup(run.measured), total_rates(run.first)
    suffix, speculator = accepted_by_source(last) or (None, None)
    return {
        "measured_speedup": _rounded(speedup.ratio if speedup else None),
        "measured": _summarize_measurement(run),
        "first_50_ratio": _rounded(first_rates[0] / first_rates[1] if first_rates else None),
        "first_50_requests": sum(len(trial.speculative.responses) for trial in run.first),
        "requests": len(run.requests),
        "failed_requests": len(run.failed),
        "edge_requests": len(first),
        "acceptance_length_first_50": _rounded(acceptance_length(first)),
        "acceptance_length_last_50": _rounded(acceptance_length(last)),
        "suffix_accepted_per_step_last_50": _rounded(suffix),
        "speculator_accepted_per_step_last_50": _rounded(speculator),
        "tokens_per_s_first_50": _rounded(first_rates[0] if first_rates else None),
        "tokens_per_s_first_50_no_speculation": _rounded(first_rates[1] if first_rates else None),
        "tokens_per_s_last_50": _rounded(last_rate(succeeded)),
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
        "domains": {name: _summarize_domain(run, name) for name in run.domains},
        "duration_s": round(run.ended - run.started, 1),
        "errors": [request.error for request in run.failed][:5],
        "crashed": run.crashed,
        "interrupted": run.interrupted,
    }


def describe_measurement(run: DemoRun) -> str:
    """Return the measured speed-up on one line, with the reason if speculation was slower than none."""
    speedup = measure_speedup(run.measured)
    if speedup is None:
        return "the speed-up was not measured"
    slower = explain_slowdown(speedup, measure_steps(run.measured), run.other_programs)
    spread = f"{len(complete_trials(run.measured))} trials from {speedup.lowest:.2f}x to {speedup.highest:.2f}x"
    return f"{describe_speedup(speedup)} ({spread})" + (f": {slower}" if slower else "")


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


def _summarize_domain(run: DemoRun, domain: str) -> dict[str, Any]:
    requests = [request for request in run.succeeded if request.domain == domain]
    first, last = split_edges(requests)
    start, end = busy_span(requests)
    # Between the blocks of the first trials the node answers requests that are not part of the traffic.
    start = max([start, *(block.ended for trial in run.first for block in trial.blocks)])
    return {
        "requests": len(requests),
        "output_tokens": sum(request.output_tokens for request in requests),
        "acceptance_length": _rounded(acceptance_length(requests)),
        "acceptance_length_first_50": _rounded(acceptance_length(first)),
        "acceptance_length_last_50": _rounded(acceptance_length(last)),
        "tokens_per_s": _rounded(tokens_per_s(run.succeeded, start, end)),
    }


def _summarize_measurement(run: DemoRun) -> dict[str, Any] | None:
    speedup, steps = measure_speedup(run.measured), measure_steps(run.measured)
    if speedup is None or steps is None:
        return None
    return {
        "by_processor_time": _rounded(speedup.by_processor_time),
        "ratios": [round(trial.ratio, 3) for trial in complete_trials(run.measured)],
        "tokens_per_s": _rounded(speedup.tokens_per_s),
        "tokens_per_s_no_speculation": _rounded(speedup.plain_tokens_per_s),
        "accepted_per_step": _rounded(steps.accepted),
        "suffix_accepted_per_step": _rounded(steps.suffix_accepted),
        "draft_tokens_per_step": _rounded(steps.drafted),
        "relative_step_time": _rounded(steps.relative_time),
        "other_programs": _rounded(run.other_programs),
        "slowdown": explain_slowdown(speedup, steps, run.other_programs),
    }


def _windows(requests: Sequence[Response], width: int) -> list[Sequence[Response]]:
    """Return for each request the ``width`` requests that end with it."""
    return [requests[max(0, i + 1 - width) : i + 1] for i in range(len(requests))]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
