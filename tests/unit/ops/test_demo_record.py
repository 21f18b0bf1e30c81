"""Figures of a demo run, from small runs with known results."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ops.demo.record import (
    DemoRun,
    LosslessResult,
    RowCounts,
    Swap,
    VersionRecord,
    acceptance_length,
    busy_span,
    edge_rates,
    find_faults,
    rolling_acceptance_length,
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


def test_constant_throughput_is_constant_at_both_edges() -> None:
    """Four concurrent requests of 8 s and 40 tokens: 20 tokens/s in every span."""
    requests = tuple(
        response(n, started=2.0 * n, ended=2.0 * n + 8, output_tokens=40, domain="math") for n in range(200)
    )
    first, last = edge_rates(DemoRun(0, 0, requests=requests))
    assert first == pytest.approx(20, rel=0.05)
    assert last == pytest.approx(20, rel=0.05)
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


def test_the_comparison_without_speculation_is_not_in_the_acceptance_length() -> None:
    plain = tuple(response(200 + n, accepted_tokens=0, draft_tokens=0, speculators=()) for n in range(20))
    assert summarize_run(replace(GOOD, plain=plain))["acceptance_length_last_50"] == 2
    assert summarize_run(replace(GOOD, plain=plain))["requests"] == 120


def test_failures_without_speculation_count_as_failures() -> None:
    broken = replace(GOOD, plain=(response(0, error="503"),))
    assert summarize_run(broken)["failed_requests"] == 1
    assert find_faults(broken)


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
    assert figures["tokens_per_s_no_speculation"] is None
