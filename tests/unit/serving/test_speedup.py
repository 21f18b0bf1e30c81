"""The speed-up compares verify steps with what their output would have taken without drafts."""

from __future__ import annotations

import pytest

from serving.planner.latency_model import ForwardTiming, LatencyCurve, LatencyModel
from serving.planner.speedup import Speedup

FORWARD_S = {1: 0.010, 5: 0.012, 9: 0.020}


def speedup() -> Speedup:
    curve = LatencyCurve(FORWARD_S)
    return Speedup(LatencyModel(curve, LatencyCurve({1: 0.0}), curve, curve))


def test_without_verify_steps_there_is_no_ratio() -> None:
    assert speedup().ratio is None


@pytest.mark.parametrize("pace", [1.0, 3.0])
def test_accepted_tokens_count_as_forwards_that_were_saved_whatever_the_pace(pace: float) -> None:
    found = speedup()
    for _ in range(10):
        found.add(3, ForwardTiming(1, 5, pace * 0.012), pace * 0.003)
    assert found.decoding_s == pytest.approx(10 * pace * 0.015)
    assert found.undrafted_s == pytest.approx(10 * pace * 3 * 0.010)
    assert found.ratio == pytest.approx(2.0)


def test_a_step_without_drafts_saves_nothing_and_costs_nothing() -> None:
    found = speedup()
    found.add(1, ForwardTiming(1, 1, 0.037), 0.0)
    assert found.ratio == 1.0
    assert found.undrafted_s == found.decoding_s == 0.037


def test_rejected_drafts_cost_time() -> None:
    found = speedup()
    found.add(1, ForwardTiming(1, 9, 0.020), 0.005)
    assert found.ratio == pytest.approx(0.4)


def test_sequences_share_a_forward() -> None:
    found = speedup()
    found.add(8, ForwardTiming(5, 9, 0.020), 0.0)
    assert found.undrafted_s == pytest.approx(8 / 5 * 0.012)


def test_the_ratio_is_that_of_recent_steps_and_the_time_that_of_all() -> None:
    found = speedup()
    for _ in range(100):
        found.add(1, ForwardTiming(1, 9, 0.020), 0.0)
    for _ in range(1000):
        found.add(2, ForwardTiming(1, 5, 0.012), 0.0)
    assert found.ratio == pytest.approx(2 * 0.010 / 0.012, rel=0.01)
    assert found.undrafted_s - found.decoding_s == pytest.approx(100 * (0.010 - 0.020) + 1000 * (0.020 - 0.012))
