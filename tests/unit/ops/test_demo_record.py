"""The figures of a demo, from small runs whose answers are known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ops.demo.record import (
    Answered,
    Lossless,
    Rows,
    Run,
    Swap,
    Version,
    accepted_per_step,
    busy_span,
    edge_rates,
    rolling_accepted_per_step,
    sound,
    summary,
    tokens_per_s,
)


def answered(number: int, **changes: object) -> Answered:
    plain = Answered(
        id=f"r{number}",
        domain="math",
        started=float(number),
        ended=number + 1.0,
        output_tokens=10,
        verify_steps=5,
        drafted=15,
        accepted=5,
        speculators=("1",),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


GOOD = Run(started=0, ended=100, requests=tuple(answered(n) for n in range(120)), rows=Rows(10, 7, 2, 1))


def test_accepted_per_step_is_weighted_by_verify_steps_and_knows_no_bonus() -> None:
    requests = [answered(0, verify_steps=1, accepted=3), answered(1, verify_steps=9, accepted=0)]
    assert accepted_per_step(requests) == pytest.approx(0.3)
    assert accepted_per_step([]) is None


def test_the_rolling_mean_looks_back_and_no_further_than_its_width() -> None:
    requests = [answered(n, verify_steps=1, accepted=n) for n in range(5)]
    assert rolling_accepted_per_step(requests, width=2) == [0, 0.5, 1.5, 2.5, 3.5]


def test_a_request_counts_by_its_share_in_the_span() -> None:
    requests = [answered(0, started=0.0, ended=10.0, output_tokens=100)]
    assert tokens_per_s(requests, 5, 15) == pytest.approx(5)
    assert tokens_per_s(requests, 20, 30) == 0
    assert tokens_per_s(requests, 5, 5) is None


def test_constant_throughput_is_measured_as_such_at_both_ends_and_in_the_tail() -> None:
    """Four at a time, each 8 s long with 40 tokens: 20 tokens/s, however the span is cut."""
    requests = tuple(
        answered(n, started=2.0 * n, ended=2.0 * n + 8, output_tokens=40, domain="math") for n in range(200)
    )
    first, last = edge_rates(Run(0, 0, requests=requests))
    assert first == pytest.approx(20, rel=0.05)
    assert last == pytest.approx(20, rel=0.05)
    assert tokens_per_s(requests, 8, busy_span(requests)[1]) == pytest.approx(20, rel=0.01)


def test_the_edges_are_the_first_and_the_last_fifty() -> None:
    requests = tuple(answered(n, accepted=0 if n < 50 else 5 if n >= 70 else 100) for n in range(120))
    figures = summary(replace(GOOD, requests=requests))
    assert figures["accepted_per_step_first_50"] == 0
    assert figures["accepted_per_step_last_50"] == 1


def test_the_edges_of_a_short_run_are_its_halves_and_never_overlap() -> None:
    requests = tuple(answered(n, accepted=0 if n < 10 else 5) for n in range(21))
    figures = summary(replace(GOOD, requests=requests))
    assert figures["edge_requests"] == 10
    assert (figures["accepted_per_step_first_50"], figures["accepted_per_step_last_50"]) == (0, 1)


def test_one_request_alone_has_no_edges() -> None:
    figures = summary(replace(GOOD, requests=(answered(0),)))
    assert (figures["edge_requests"], figures["accepted_per_step_first_50"], figures["tokens_per_s_last_50"]) == (
        0,
        None,
        None,
    )


def test_the_comparison_without_speculation_is_not_in_the_accepted_per_step() -> None:
    plain = tuple(answered(200 + n, accepted=0, drafted=0, speculators=()) for n in range(20))
    assert summary(replace(GOOD, plain=plain))["accepted_per_step_last_50"] == 1
    assert summary(replace(GOOD, plain=plain))["requests"] == 120


def test_failures_without_speculation_count_as_failures() -> None:
    broken = replace(GOOD, plain=(answered(0, error="503"),))
    assert summary(broken)["failed_requests"] == 1
    assert not sound(broken)


def test_a_good_run_is_sound() -> None:
    assert sound(GOOD)


@pytest.mark.parametrize(
    "fault",
    [
        {"requests": (answered(0, error="timeout"),)},
        {"lossless": Lossless(checked=20, mismatches=1)},
        {"rows": Rows(published=11, in_table=7, shed=2, dead=1)},
        {"crashed": "stream died"},
        {"interrupted": True},
    ],
)
def test_any_fault_makes_a_run_unsound(fault: dict[str, object]) -> None:
    assert not sound(replace(GOOD, **fault))  # type: ignore[arg-type]


def test_near_ties_are_reported_and_not_held_against_the_run() -> None:
    run = replace(GOOD, lossless=Lossless(checked=20, near_ties=3))
    assert sound(run)
    assert summary(run)["lossless_near_ties"] == 3


def test_versions_and_swaps_are_told() -> None:
    run = replace(
        GOOD,
        versions=(Version("1", 5.0, promoted=6.0), Version("2", 7.0)),
        swaps=(Swap("1", 8.0, in_flight=4, pause_ms=2.04),),
    )
    figures = summary(run)
    assert (figures["versions_registered"], figures["versions_promoted"]) == (2, 1)
    assert figures["swaps"] == [{"version": "1", "at_s": 8.0, "in_flight": 4, "pause_ms": 2.0}]


def test_each_domain_has_figures_of_its_own() -> None:
    requests = tuple(answered(n, domain="math" if n < 60 else "code", accepted=n >= 60) for n in range(120))
    domains = summary(replace(GOOD, requests=requests))["domains"]
    assert list(domains) == ["math", "code"]
    assert (domains["math"]["accepted_per_step"], domains["code"]["accepted_per_step"]) == (0, 0.2)


def test_a_run_of_which_nothing_is_known_can_still_be_told() -> None:
    figures = summary(Run(started=0, ended=1, crashed="broker"))
    assert figures["accepted_per_step_first_50"] is None
    assert figures["tokens_per_s_no_speculation"] is None
