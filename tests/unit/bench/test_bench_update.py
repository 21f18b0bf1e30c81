"""The sweep of update intervals: active versions, costs, and the frontier."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from tiny_target import write_tiny_target
from typer.testing import CliRunner

from ops.bench.harness import Figure, Report
from ops.bench.update import (
    MeasuredUpdate,
    OutputSpan,
    UpdateCosts,
    describe_outcome,
    fetch_cost,
    frontier_chart,
    judge_costs,
    judge_policies,
    render_update_page,
    simulate_policy,
    sweep_policies,
)
from ops.cli.main import app
from schemas.settings import Update

COSTS = UpdateCosts(verify_step_s=0.02, pause_s=0.002, fetch_s=0.098)
ANSWERED = [1000] * 24


def learning(version: int, block: int) -> float:
    """Each version is a little better than the one before, on all traffic."""
    return 0.1 * version


def test_without_an_interval_every_version_serves_its_block() -> None:
    served = []

    def noted(version: int, block: int) -> float:
        served.append((version, block))
        return learning(version, block)

    every = simulate_policy("every", Update(min_interval=0), ANSWERED, noted, COSTS)
    assert served == [(block, block) for block in range(24)]
    assert every.updates == 23
    assert every.updating_s == pytest.approx(23 * 0.1)
    verify_steps = sum(1000 / (1 + 0.1 * block) for block in range(24))
    assert every.accepted == pytest.approx(24_000 - verify_steps)
    assert every.serving_s == pytest.approx(verify_steps * 0.02 + 2.3)


def test_longer_intervals_update_less_and_accept_less() -> None:
    *fixed, auto = sweep_policies(ANSWERED, learning, COSTS, Update())
    every, never = fixed[0], fixed[-1]
    updates = [outcome.updates for outcome in fixed]
    shares = [outcome.accepted_share(every) for outcome in fixed]
    assert updates[0] == 23
    assert updates == sorted(set(updates), reverse=True)
    assert shares == sorted(shares, reverse=True)
    assert (every.accepted_share(every), never.accepted_share(every), never.overhead) == (1.0, 0.0, 0.0)
    assert never.accepted_share(every) < auto.accepted_share(every) <= 1


def test_auto_updates_often_only_while_versions_improve() -> None:
    dear = UpdateCosts(verify_step_s=0.02, pause_s=0.5, fetch_s=0.5)
    *_, hurried = sweep_policies([3000] * 40, learning, dear, Update())
    *_, idle = sweep_policies([3000] * 40, lambda version, block: 1.0, dear, Update())
    assert idle.updates < hurried.updates / 2
    assert hurried.output_share(sweep_policies([3000] * 40, learning, dear, Update())[0]) > 0.9


def test_the_cost_of_fetching_is_averaged_over_all_updates() -> None:
    slower = MeasuredUpdate(0.002, OutputSpan(100, 1.0), OutputSpan(150, 2.0))
    faster = MeasuredUpdate(0.002, OutputSpan(100, 1.0), OutputSpan(250, 2.0))
    assert fetch_cost([slower, slower]) == pytest.approx(0.5)
    assert fetch_cost([slower, faster]) == pytest.approx(0.0)
    assert fetch_cost([faster]) == 0.0


def test_report_and_page_contain_every_policy() -> None:
    outcomes = sweep_policies(ANSWERED, learning, COSTS, Update())
    points = [describe_outcome(outcome, outcomes[0]) for outcome in outcomes]
    assert [points[0]["policy"], points[-2]["policy"], points[-1]["policy"]] == ["every version", "never", "auto"]
    assert points[0]["accepted_tokens_kept"] == 1.0
    figures: list[Figure] = [
        *judge_costs(COSTS),
        *judge_policies("mixed", outcomes),
        *judge_policies("ordered", outcomes),
    ]
    about = {"traffic": {"requests": 24, "tokens": 24_000}}
    report = Report("update", {"processor": "one", "cores": 2}, "code", about, tuple(figures))
    html = render_update_page({"ordered": outcomes, "mixed": outcomes}, report)
    assert html.count("<svg") == 2
    assert all(point["policy"] in html for point in points)
    ET.fromstring(frontier_chart("mixed", outcomes))


def test_missing_traffic_names_the_command_that_records_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = write_tiny_target(tmp_path / "target")
    invoked = CliRunner().invoke(app, ["bench", "update", "--set", f"target.path={target}"])
    assert invoked.exit_code == 2
    assert "aurora bench learning --record" in invoked.stderr
