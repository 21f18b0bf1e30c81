"""Driving an engine, and the figures from the times of its outputs."""

from __future__ import annotations

import threading

import pytest
from echo_engine import EchoEngine

from ops.bench.engines import DriveResult, TimedOutput, drive
from ops.bench.serving.concurrent_requests import SwapMoment, waits_around
from serving.engines.base import Output, Request


def request(name: str) -> Request:
    return Request(name, (1, 2, 3, 4, 5), max_tokens=5)


class Watched(EchoEngine):
    """Knows how many requests were in it at most, and holds the first ones until so many are."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.wanted, self.most, self.running = wanted, 0, 0
        self.lock = threading.Lock()
        self.gate.clear()

    def submit(self, request: Request, on_output) -> None:  # type: ignore[no-untyped-def]
        def watch(output: Output) -> None:
            if output.finish:
                with self.lock:
                    self.running -= 1
            on_output(output)

        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        super().submit(request, watch)
        if self.most >= self.wanted:
            self.gate.set()


@pytest.mark.parametrize("concurrency", [1, 3])
def test_the_concurrency_is_kept_until_all_requests_have_finished(concurrency: int) -> None:
    engine = Watched(concurrency)
    result = drive(engine, (request(f"r{i}") for i in range(8)), concurrency)
    assert sorted(output.request.id for output in result.outputs) == [f"r{i}" for i in range(8)]
    assert engine.most == concurrency
    assert (result.tokens, result.failed) == (40, 0)
    assert result.tokens_per_s == pytest.approx(40 / result.seconds)
    assert all(
        len(output.times) > len(output.gaps) > 0 and output.time_to_first_token_s > 0 for output in result.outputs
    )


def test_a_request_that_ends_in_an_error_counts_as_failed() -> None:
    engine = EchoEngine()
    engine.dies_with = "out of memory"
    assert drive(engine, [request("r")], 1).failed == 1


def output_at(*times: float) -> TimedOutput:
    return TimedOutput(request("r"), submitted=times[0] - 1, times=list(times), finish="length")


def test_the_wait_at_a_swap_is_the_excess_of_its_longest_gap_over_the_usual_one() -> None:
    steady = output_at(0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    held_up = output_at(0.0, 0.1, 0.2, 0.5, 0.6, 0.7)
    usual, waits = waits_around(
        DriveResult((steady, held_up), 1.0), [SwapMoment(0.22, 0.25), SwapMoment(0.61, 0.62), SwapMoment(9.0, 9.1)]
    )
    assert usual == pytest.approx(100)
    assert waits == pytest.approx([200, 0, 0])
