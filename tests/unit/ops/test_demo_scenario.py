"""Phases of the demo: their length, and the requests of the trials."""

from __future__ import annotations

import pytest

from ops.demo.record import EDGE
from ops.demo.scenario import plan_traffic, plan_trials, size_first_blocks, size_measured_block


@pytest.mark.parametrize("concurrency", [1, 2, 3, 8, 16, 50, 64])
def test_the_first_blocks_are_full_and_together_the_first_fifty_requests(concurrency: int) -> None:
    sizes = size_first_blocks(concurrency)
    assert 1 <= len(sizes) <= 4
    assert all(size > 0 and size % concurrency == 0 for size in sizes)
    assert EDGE <= sum(sizes) < EDGE + concurrency


@pytest.mark.parametrize(("concurrency", "size"), [(1, 16), (3, 15), (4, 16), (8, 16), (64, 128)])
def test_a_measured_block_is_full_and_keeps_all_clients_busy(concurrency: int, size: int) -> None:
    assert size_measured_block(concurrency) == size


def test_the_traffic_takes_what_the_other_phases_leave() -> None:
    traffic_s = plan_traffic(9.5, elapsed_s=130)
    assert traffic_s + 130 + 2 * plan_trials(9.5, block_s=10) * 10 < 9.5 * 60
    assert plan_traffic(9.5, elapsed_s=150) == traffic_s - 20
    assert plan_traffic(2, elapsed_s=100) == 30


def test_a_slow_machine_measures_less() -> None:
    assert [plan_trials(9.5, block_s) for block_s in (1, 10, 100)] == [8, 5, 3]
