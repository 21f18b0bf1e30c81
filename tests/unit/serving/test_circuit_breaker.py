"""The circuit breaker opens after failures in a row, probes while open, and never stays open."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.traces.circuit_breaker import CircuitBreaker


def open_breaker(max_failures: int = 3, probe_s: float = 5.0) -> CircuitBreaker:
    breaker = CircuitBreaker(max_failures, probe_s)
    for _ in range(max_failures):
        breaker.record_failure(100.0)
    return breaker


def test_it_opens_after_the_set_number_of_failures_in_a_row() -> None:
    breaker = CircuitBreaker(3, 5.0)
    for _ in range(2):
        breaker.record_failure(0.0)
    breaker.record_success()
    for _ in range(2):
        breaker.record_failure(0.0)
    assert breaker.state == "closed"
    breaker.record_failure(0.0)
    assert breaker.state == "open"


def test_an_open_circuit_allows_one_probe_per_interval() -> None:
    breaker = open_breaker()
    assert [breaker.allows(t) for t in (100.0, 104.9, 105.0, 105.1, 109.9, 110.0)] == [
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    assert breaker.state == "half_open"


def test_a_failed_probe_reopens_the_circuit_and_a_success_closes_it() -> None:
    breaker = open_breaker()
    assert breaker.allows(105.0)
    breaker.record_failure(106.0)
    assert (breaker.state, breaker.allows(110.9), breaker.allows(111.0)) == ("open", False, True)
    breaker.record_success()
    assert (breaker.state, breaker.allows(111.0)) == ("closed", True)


@given(st.lists(st.sampled_from(["fail", "admit"]), max_size=50))
def test_a_success_always_closes_the_circuit_and_an_interval_always_allows_a_probe(events: list[str]) -> None:
    breaker, now = CircuitBreaker(2, 5.0), 0.0
    for event in events:
        now += 1
        if event == "fail":
            breaker.record_failure(now)
        else:
            breaker.allows(now)
    assert breaker.allows(now + 5.0)
    breaker.record_success()
    assert breaker.state == "closed"
