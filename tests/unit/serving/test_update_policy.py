"""Interval, jitter and staleness decide when an update is due, and ``auto`` finds the best interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.settings import Update
from serving.versions.update_policy import WINDOW_S, CounterReading, UpdatePolicy, best_interval, fetch_cost_s


def policy(interval_s: float | Literal["auto"], jitter: float = 0.0, max_staleness: float = 900.0) -> UpdatePolicy:
    return UpdatePolicy(Update(min_interval=interval_s, jitter=jitter, max_staleness=max_staleness), "node-0")


def update(policy: UpdatePolicy, time_s: float) -> None:
    """Record an update without any readings."""
    now = CounterReading(time_s, 0, 0, 0)
    policy.record_swap()
    policy.record_update(now, now, 0.002)


def test_without_an_interval_a_newer_version_is_due_at_once() -> None:
    sync = policy(0.0, jitter=1.0)
    update(sync, 100.0)
    assert sync.due_at("7", 100.5) == 100.5


def test_the_interval_starts_at_the_last_update() -> None:
    sync = policy(60.0)
    assert sync.due_at("7", 100.0) == 100.0
    update(sync, 100.0)
    assert [sync.due_at("8", since) for since in (110.0, 160.0, 200.0)] == [160.0, 160.0, 200.0]


def test_staleness_bounds_the_delay() -> None:
    sync = policy(600.0, jitter=1.0, max_staleness=120.0)
    update(sync, 100.0)
    assert sync.due_at("8", 110.0) == 230.0


@settings(deadline=None)
@given(
    interval_s=st.floats(0, 3600),
    jitter=st.floats(0, 1),
    staleness_s=st.floats(1, 7200),
    last=st.floats(0, 1e6),
    wait_s=st.floats(0, 7200),
    version=st.integers(1, 10_000),
)
def test_a_version_is_due_within_its_bounds(
    interval_s: float, jitter: float, staleness_s: float, last: float, wait_s: float, version: int
) -> None:
    sync = policy(interval_s, jitter, staleness_s)
    update(sync, last)
    behind_since = last + wait_s
    due = sync.due_at(str(version), behind_since)
    assert behind_since <= due <= behind_since + staleness_s
    assert due <= max(behind_since, last + interval_s) + jitter * interval_s + 1e-6
    assert due >= min(last + interval_s, behind_since + staleness_s)


def test_nodes_are_spread_over_the_jitter() -> None:
    due = []
    for n in range(200):
        sync = UpdatePolicy(Update(min_interval=100.0, jitter=0.5), f"node-{n}")
        update(sync, 0.0)
        due.append(sync.due_at("8", 1000.0) - 1000.0)
    assert 0 <= min(due) < 5
    assert 45 < max(due) < 50
    assert 20 < sum(due) / 200 < 30


@settings(deadline=None)
@given(cost=st.floats(1e-4, 10), gain=st.floats(1e-6, 1), other=st.floats(0.1, 10))
def test_no_other_interval_loses_less_output(cost: float, gain: float, other: float) -> None:
    def lost(interval: float) -> float:
        return cost / interval + gain * interval / 2

    best = best_interval(cost, gain)
    assert lost(best) <= lost(best * other) * (1 + 1e-9)


def test_without_a_gain_the_best_interval_is_infinite() -> None:
    assert best_interval(1.0, 0.0) == best_interval(1.0, -0.1) == math.inf


def test_the_fetch_cost_is_the_output_lost_meanwhile() -> None:
    started = CounterReading(10.0, 0, 0, 0)
    assert fetch_cost_s(100.0, started, CounterReading(14.0, 0, 0, 300)) == pytest.approx(1.0)
    assert fetch_cost_s(100.0, started, CounterReading(14.0, 0, 0, 500)) == 0.0
    assert fetch_cost_s(0.0, started, CounterReading(14.0, 0, 0, 0)) == 0.0


@dataclass
class Serving:
    """A node that updates at intervals; each version gains a share of the output over the one before."""

    sync: UpdatePolicy
    every_s: float
    pause_s: float
    gain: float
    now: float = 0.0
    verify_steps: int = 0
    accepted: int = 0
    accepted_per_step: float = 1.0

    def serve(self, times: int) -> None:
        for _ in range(times):
            until = self.now + self.every_s
            while self.now < until:
                self.now += 2.0
                self.verify_steps += 100
                self.accepted += round(100 * self.accepted_per_step)
                self.sync.record_reading(self.reading)
            self.sync.record_swap()
            self.sync.record_update(self.reading, self.reading, self.pause_s)
            self.accepted_per_step = (1 + self.accepted_per_step) * (1 + self.gain) - 1

    @property
    def reading(self) -> CounterReading:
        return CounterReading(self.now, self.verify_steps, self.accepted, self.verify_steps + self.accepted)


@pytest.mark.parametrize("every_s", [WINDOW_S / 2, 2 * WINDOW_S])
def test_auto_finds_the_interval_that_loses_least(every_s: float) -> None:
    sync = policy("auto")
    Serving(sync, every_s=every_s, pause_s=0.4, gain=0.02).serve(16)
    assert sync.interval_s == pytest.approx(best_interval(0.4, 0.02 / every_s), rel=0.05)


def test_auto_widens_up_to_the_staleness_without_a_gain() -> None:
    sync = policy("auto", max_staleness=300.0)
    serving = Serving(sync, every_s=120.0, pause_s=0.002, gain=-0.001)
    widths = []
    for _ in range(14):
        serving.serve(1)
        widths.append(sync.interval_s)
    assert widths[0] == 0.0
    assert all(wide <= 2 * max(narrow, 1.0) for narrow, wide in pairwise(widths))
    assert widths[-1] == 300.0


def test_auto_narrows_again_when_versions_gain() -> None:
    sync = policy("auto")
    serving = Serving(sync, every_s=120.0, pause_s=0.002, gain=-0.001)
    serving.serve(14)
    wide, serving.gain = sync.interval_s, 0.05
    serving.serve(12)
    assert sync.interval_s < wide / 50


def test_auto_ignores_updates_with_too_few_verify_steps() -> None:
    sync = policy("auto")
    for number in range(10):
        for second in range(0, 120, 2):
            sync.record_reading(CounterReading(number * 120.0 + second, number, number, 2 * number))
        update(sync, number * 120.0 + 120)
    assert sync.interval_s == 0.0
