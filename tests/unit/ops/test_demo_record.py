"""Figures of a demo run, from small runs with known results."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ops.demo.comparison import Block, Trial
from ops.demo.record import (
    DemoRun,
    LosslessResult,
    RowCounts,
    Swap,
    VersionRecord,
    acceptance_length,
    accepted_by_source,
    busy_span,
    describe_measurement,
    find_faults,
    last_rate,
    rolling_acceptance_length,
    rolling_suffix_length,
    summarize_run,
    tokens_per_s,
)
from ops.loadgen.load import Response


def response(number: int, **changes: object) -> Response:
    plain = Response(
        id=f"r{number}",
        domain="math",
        started=float(number),
        ended=number + 1.0,
        output_tokens=10,
        verify_steps=5,
        draft_tokens=15,
        accepted_tokens=5,
        speculators=("1",),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


GOOD = DemoRun(started=0, ended=100, requests=tuple(response(n) for n in range(120)), rows=RowCounts(10, 7, 2, 1))


def test_acceptance_length_is_weighted_by_verify_steps_and_includes_the_bonus_token() -> None:
    requests = [response(0, verify_steps=1, accepted_tokens=3), response(1, verify_steps=9, accepted_tokens=0)]
    assert acceptance_length(requests) == pytest.approx(1.3)
    assert acceptance_length([]) is None


def test_the_rolling_mean_covers_its_width() -> None:
    requests = [response(n, verify_steps=1, accepted_tokens=n) for n in range(5)]
    assert rolling_acceptance_length(requests, width=2) == [1, 1.5, 2.5, 3.5, 4.5]


def test_a_request_counts_by_its_share_in_the_span() -> None:
    requests = [response(0, started=0.0, ended=10.0, output_tokens=100)]
    assert tokens_per_s(requests, 5, 15) == pytest.approx(5)
    assert tokens_per_s(requests, 20, 30) == 0
    assert tokens_per_s(requests, 5, 5) is None


def test_constant_throughput_is_constant_at_the_end() -> None:
    """Four concurrent requests of 8 s and 40 tokens: 20 tokens/s in every span."""
    requests = tuple(
        response(n, started=2.0 * n, ended=2.0 * n + 8, output_tokens=40, domain="math") for n in range(200)
    )
    assert last_rate(requests) == pytest.approx(20, rel=0.05)
    assert last_rate(requests[:1]) is None
    assert tokens_per_s(requests, 8, busy_span(requests)[1]) == pytest.approx(20, rel=0.01)


def test_the_edges_are_the_first_and_the_last_fifty() -> None:
    requests = tuple(response(n, accepted_tokens=0 if n < 50 else 5 if n >= 70 else 100) for n in range(120))
    figures = summarize_run(replace(GOOD, requests=requests))
    assert figures["acceptance_length_first_50"] == 1
    assert figures["acceptance_length_last_50"] == 2


def test_the_edges_of_a_short_run_are_its_halves_and_never_overlap() -> None:
    requests = tuple(response(n, accepted_tokens=0 if n < 10 else 5) for n in range(21))
    figures = summarize_run(replace(GOOD, requests=requests))
    assert figures["edge_requests"] == 10
    assert (figures["acceptance_length_first_50"], figures["acceptance_length_last_50"]) == (1, 2)


def test_one_request_alone_has_no_edges() -> None:
    figures = summarize_run(replace(GOOD, requests=(response(0),)))
    assert (figures["edge_requests"], figures["acceptance_length_first_50"], figures["tokens_per_s_last_50"]) == (
        0,
        None,
        None,
    )


def test_each_accepted_token_has_one_source() -> None:
    requests = [response(0, suffix_accepted_tokens=2), response(1, suffix_accepted_tokens=1)]
    assert accepted_by_source(requests) == (pytest.approx(0.3), pytest.approx(0.7))
    assert accepted_by_source([]) is None
    assert rolling_suffix_length(requests, width=1) == [1.4, 1.2]


def trial(spent: float, plain_spent: float, **changes: object) -> Trial:
    """Return a trial of one request with ten tokens in each block."""
    return Trial(
        speculative=Block((response(0, ended=spent, **changes),), processor_s=spent),
        plain=Block((response(0, ended=plain_spent),), processor_s=plain_spent),
    )


def test_the_summary_has_the_measured_speedup_and_the_ratio_of_the_first_requests() -> None:
    run = replace(GOOD, first=(trial(5, 4), trial(4, 5)), measured=(trial(2, 3), trial(2, 4), trial(2, 5)))
    figures = summarize_run(run)
    assert (figures["measured_speedup"], figures["first_50_ratio"], figures["first_50_requests"]) == (2, 1, 2)
    assert figures["measured"]["ratios"] == [1.5, 2, 2.5]
    assert figures["measured"]["slowdown"] is None
    assert figures["requests"] == 120


def test_the_measurement_is_one_line_that_explains_a_slowdown() -> None:
    assert describe_measurement(GOOD) == "the speed-up was not measured"
    faster = describe_measurement(replace(GOOD, measured=(trial(2, 3), trial(2, 4))))
    assert faster == "1.75x: 3 -> 5 tokens/s (2 trials from 1.50x to 2.00x)"
    slower = describe_measurement(replace(GOOD, measured=(trial(4, 2), trial(4, 2)), other_programs=0.5))
    assert slower.startswith("0.50x: 5 -> 2 tokens/s (2 trials from 0.50x to 0.50x): a verify step yields 2.00 tokens")
    assert "\n" not in slower


def test_failures_in_trials_count_as_failures_once() -> None:
    failed = trial(1, 1, error="503")
    assert summarize_run(replace(GOOD, measured=(failed,)))["failed_requests"] == 1
    # The speculative blocks of the first trials are part of the traffic.
    traffic = replace(GOOD, first=(failed,), requests=(*GOOD.requests, *failed.speculative.responses))
    assert summarize_run(traffic)["failed_requests"] == 1
    assert find_faults(traffic)


def test_a_good_run_is_sound() -> None:
    assert not find_faults(GOOD)


@pytest.mark.parametrize(
    "fault",
    [
        {"requests": (response(0, error="timeout"),)},
        {"lossless": LosslessResult(checked=20, mismatches=1)},
        {"rows": RowCounts(published=11, in_table=7, dropped=2, dead=1)},
        {"crashed": "stream died"},
        {"interrupted": True},
    ],
)
def test_any_fault_makes_a_run_unsound(fault: dict[str, object]) -> None:
    assert find_faults(replace(GOOD, **fault))  # type: ignore[arg-type]


def test_near_ties_are_reported_and_are_no_fault() -> None:
    run = replace(GOOD, lossless=LosslessResult(checked=20, near_ties=3))
    assert not find_faults(run)
    assert summarize_run(run)["lossless_near_ties"] == 3


def test_the_summary_lists_versions_and_swaps() -> None:
    run = replace(
        GOOD,
        versions=(VersionRecord("1", 5.0, promoted=6.0), VersionRecord("2", 7.0)),
        swaps=(Swap("1", 8.0, in_flight=4, pause_ms=2.04),),
    )
    figures = summarize_run(run)
    assert (figures["versions_registered"], figures["versions_promoted"]) == (2, 1)
    assert figures["swaps"] == [{"version": "1", "at_s": 8.0, "in_flight": 4, "pause_ms": 2.0}]


def test_each_domain_has_its_own_figures() -> None:
    requests = tuple(response(n, domain="math" if n < 60 else "code", accepted_tokens=n >= 60) for n in range(120))
    domains = summarize_run(replace(GOOD, requests=requests))["domains"]
    assert list(domains) == ["math", "code"]
    assert (domains["math"]["acceptance_length"], domains["code"]["acceptance_length"]) == (1, 1.2)


def test_an_empty_run_has_a_summary() -> None:
    figures = summarize_run(DemoRun(started=0, ended=1, crashed="broker"))
    assert figures["acceptance_length_first_50"] is None
    assert (figures["measured_speedup"], figures["measured"], figures["first_50_ratio"]) == (None, None, None)
