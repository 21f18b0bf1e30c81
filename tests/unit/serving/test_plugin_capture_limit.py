"""The share of recorded requests follows from the time that the capture takes."""

from __future__ import annotations

import pytest

from serving.engines.plugin.metrics import MIN_REQUEST_RATIO, WINDOW_S, CaptureLimit, adjust_ratio


def test_the_ratio_falls_until_the_cost_fits_the_limit() -> None:
    assert adjust_ratio(1.0, cost_s=0.2, busy_s=2.0, limit=0.05) == pytest.approx(0.5)
    assert adjust_ratio(MIN_REQUEST_RATIO, cost_s=1.0, busy_s=1.0, limit=0.01) == MIN_REQUEST_RATIO


def test_the_ratio_rises_only_below_half_of_the_limit() -> None:
    assert adjust_ratio(0.5, cost_s=0.02, busy_s=2.0, limit=0.05) == pytest.approx(0.625)
    assert adjust_ratio(0.5, cost_s=0.08, busy_s=2.0, limit=0.05) == 0.5
    assert adjust_ratio(1.0, cost_s=0.0, busy_s=2.0, limit=0.05) == 1.0


def test_idle_time_does_not_count_as_busy() -> None:
    limit = CaptureLimit(limit=0.05)
    for second in range(20):  # a step each two seconds: idle in between
        limit.start_step(2.0 * second)
        limit.add_cost(0.1)
    assert (limit.request_ratio, limit.time_ratio) == (1.0, 0.0)


def test_a_window_of_busy_steps_adjusts_the_ratio() -> None:
    limit = CaptureLimit(limit=0.05)
    for number in range(int(WINDOW_S / 0.1) + 2):
        limit.add_cost(0.01)
        limit.start_step(0.1 * number)
    assert limit.time_ratio == pytest.approx(0.1, rel=0.1)
    assert limit.request_ratio == pytest.approx(0.5, rel=0.1)
