"""How much of the traffic is recorded, from what recording costs."""

from __future__ import annotations

import pytest

from serving.engines.sglang.plugin.cost import LEAST, WINDOW_S, CostGate, adjusted


def test_the_share_falls_until_the_cost_fits() -> None:
    assert adjusted(1.0, cost_s=0.2, busy_s=2.0, limit=0.05) == pytest.approx(0.5)
    assert adjusted(LEAST, cost_s=1.0, busy_s=1.0, limit=0.01) == LEAST


def test_the_share_rises_only_well_below_the_limit() -> None:
    assert adjusted(0.5, cost_s=0.02, busy_s=2.0, limit=0.05) == pytest.approx(0.625)
    assert adjusted(0.5, cost_s=0.08, busy_s=2.0, limit=0.05) == 0.5
    assert adjusted(1.0, cost_s=0.0, busy_s=2.0, limit=0.05) == 1.0


def test_time_in_which_the_server_had_nothing_to_do_pays_for_nothing() -> None:
    gate = CostGate(limit=0.05)
    for second in range(20):  # a step each two seconds: idle in between
        gate.step(2.0 * second)
        gate.pay(0.1)
    assert (gate.share, gate.spent) == (1.0, 0.0)


def test_a_window_of_busy_steps_decides() -> None:
    gate = CostGate(limit=0.05)
    for number in range(int(WINDOW_S / 0.1) + 2):
        gate.pay(0.01)
        gate.step(0.1 * number)
    assert gate.spent == pytest.approx(0.1, rel=0.1)
    assert gate.share == pytest.approx(0.5, rel=0.1)
