"""Speed with and without speculation, from trials with known times and tokens."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from ops.demo.comparison import (
    Block,
    ProcessorTimes,
    Trial,
    describe_speedup,
    explain_slowdown,
    measure_speedup,
    measure_steps,
    other_programs,
    read_processor_times,
    total_rates,
)
from ops.loadgen.load import Response


def block(started: float, seconds: float, **changes: object) -> Block:
    """Return two concurrent responses of 100 tokens each."""
    plain = Response("r", "math", started, started + seconds, output_tokens=100, verify_steps=100)
    responses = replace(plain, **changes), replace(plain, ended=started + seconds / 2)  # type: ignore[arg-type]
    return Block(responses, processor_s=seconds / 4)


def trial(seconds: float, plain_seconds: float, **changes: object) -> Trial:
    return Trial(speculative=block(0, seconds, **changes), plain=block(100, plain_seconds))


def test_the_rate_of_a_block_is_over_the_time_until_its_last_response() -> None:
    assert block(50, 4).tokens_per_s == 50


def test_the_speedup_is_the_median_ratio_with_its_range() -> None:
    found = measure_speedup([trial(10, 10), trial(5, 10), trial(8, 10)])
    assert found is not None
    assert (found.ratio, found.lowest, found.highest) == (1.25, 1, 2)
    assert (found.tokens_per_s, found.plain_tokens_per_s) == (25, 20)
    assert describe_speedup(found) == "1.25x: 20 -> 25 tokens/s"


def test_the_ratio_by_processor_time_ignores_the_wait_for_a_processor() -> None:
    waited = Trial(speculative=replace(block(0, 20), processor_s=2), plain=replace(block(100, 10), processor_s=3))
    found = measure_speedup([waited])
    assert found is not None
    assert (found.ratio, found.by_processor_time) == (0.5, 1.5)


def test_total_rates_weigh_a_trial_by_its_time() -> None:
    assert total_rates([trial(30, 10), trial(10, 10)]) == (10, 20)


def test_a_trial_with_a_failed_request_does_not_count() -> None:
    broken = trial(1, 10, error="503", output_tokens=0)
    assert measure_speedup([broken, trial(5, 10)]) == measure_speedup([trial(5, 10)])
    assert total_rates([broken, trial(5, 10)]) == total_rates([trial(5, 10)])
    assert (measure_speedup([broken]), total_rates([broken]), measure_steps([broken])) == (None, None, None)


def test_the_speedup_is_the_tokens_per_step_over_the_relative_time_of_a_step() -> None:
    """150 verify steps for 200 tokens: 50 accepted, 20 of them from the suffix drafter alone."""
    drafted = trial(12, 10, verify_steps=50, accepted_tokens=50, suffix_accepted_tokens=20, draft_tokens=120)
    steps, speedup = measure_steps([drafted]), measure_speedup([drafted])
    assert steps is not None
    assert speedup is not None
    assert (steps.accepted, steps.suffix_accepted, steps.drafted) == pytest.approx((1 / 3, 2 / 15, 0.8))
    assert steps.relative_time == pytest.approx(1.6)
    assert speedup.ratio == pytest.approx((1 + steps.accepted) / steps.relative_time)


def test_a_slowdown_names_yield_and_cost_of_a_step_and_a_busy_machine() -> None:
    drafted = trial(12, 10, verify_steps=50, accepted_tokens=50, suffix_accepted_tokens=20, draft_tokens=120)
    speedup = measure_speedup([drafted])
    assert speedup is not None
    reason = explain_slowdown(speedup, measure_steps([drafted]), busy=0.3)
    assert reason == (
        "a verify step yields 1.33 tokens (0.13 from the suffix drafter, 0.20 from the speculator, 1 from the target) "
        "out of 0.80 drafted, and takes 1.60 times as long as one without a draft; other programs used 30% of the "
        "processors (the ratio is 0.83x by the node's processor time)"
    )
    assert "other programs" not in (explain_slowdown(speedup, measure_steps([drafted]), busy=0.02) or "")


def test_a_speedup_needs_no_explanation() -> None:
    speedup = measure_speedup([trial(5, 10)])
    assert speedup is not None
    assert explain_slowdown(speedup, measure_steps([trial(5, 10)]), busy=0.9) is None


def test_other_programs_used_what_is_neither_idle_nor_our_own() -> None:
    before = ProcessorTimes(at=10, busy_s=100, own_s=50)
    assert other_programs(before, ProcessorTimes(at=20, busy_s=113, own_s=55), processors=2) == pytest.approx(0.4)
    assert other_programs(before, ProcessorTimes(at=20, busy_s=104, own_s=55), processors=2) == 0


def test_our_own_processor_time_includes_running_child_processes() -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"
    before = read_processor_times()
    with subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        now = read_processor_times()
        child.communicate(b"\n")
    assert now.own_s - before.own_s >= 0.25
    assert now.busy_s > before.busy_s
