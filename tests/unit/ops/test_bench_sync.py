"""The sweep of intervals: what is served when, what it costs, and what the frontier says of it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from tiny_target import write_tiny_target
from typer.testing import CliRunner

from ops.bench.outcome import Report
from ops.bench.paired import Figure
from ops.bench.sync import _costs, _figures, _point
from ops.bench.sync_costs import Stretch, Takeover, fetch_cost
from ops.bench.sync_page import frontier, page
from ops.bench.sync_policies import Costs, kept, net, serve, swept
from ops.cli.main import app
from schemas.settings import Update

COSTS = Costs(verify_step_s=0.02, pause_s=0.002, fetch_s=0.098)
ANSWERED = [1000] * 24


def learning(version: int, block: int) -> float:
    """Each version is a little better than the one before, on all traffic."""
    return 0.1 * version


def test_without_an_interval_every_version_serves_its_block() -> None:
    served = []

    def noted(version: int, block: int) -> float:
        served.append((version, block))
        return learning(version, block)

    every = serve("every", Update(min_interval=0), ANSWERED, noted, COSTS)
    assert served == [(block, block) for block in range(24)]
    assert every.takeovers == 23
    assert every.swapping_s == pytest.approx(23 * 0.1)
    verify_steps = sum(1000 / (1 + 0.1 * block) for block in range(24))
    assert every.accepted == pytest.approx(24_000 - verify_steps)
    assert every.serving_s == pytest.approx(verify_steps * 0.02 + 2.3)


def test_longer_intervals_swap_less_and_keep_less() -> None:
    *fixed, auto = swept(ANSWERED, learning, COSTS, Update())
    every, never = fixed[0], fixed[-1]
    takeovers = [outcome.takeovers for outcome in fixed]
    shares = [kept(outcome, every) for outcome in fixed]
    assert takeovers[0] == 23
    assert takeovers == sorted(set(takeovers), reverse=True)
    assert shares == sorted(shares, reverse=True)
    assert (kept(every, every), kept(never, every), never.overhead) == (1.0, 0.0, 0.0)
    assert kept(never, every) < kept(auto, every) <= 1


def test_auto_follows_closely_what_gets_better_and_loosely_what_does_not() -> None:
    dear = Costs(verify_step_s=0.02, pause_s=0.5, fetch_s=0.5)
    *_, hurried = swept([3000] * 40, learning, dear, Update())
    *_, idle = swept([3000] * 40, lambda version, block: 1.0, dear, Update())
    assert idle.takeovers < hurried.takeovers / 2
    assert net(hurried, swept([3000] * 40, learning, dear, Update())[0]) > 0.9


def test_what_fetching_takes_is_told_of_all_takeovers_together() -> None:
    slower = Takeover(0.002, Stretch(100, 1.0), Stretch(150, 2.0))
    faster = Takeover(0.002, Stretch(100, 1.0), Stretch(250, 2.0))
    assert fetch_cost([slower, slower]) == pytest.approx(0.5)
    assert fetch_cost([slower, faster]) == pytest.approx(0.0)
    assert fetch_cost([faster]) == 0.0


def test_the_report_has_a_point_for_every_policy_and_the_page_draws_them() -> None:
    outcomes = swept(ANSWERED, learning, COSTS, Update())
    points = [_point(outcome, outcomes[0]) for outcome in outcomes]
    assert [points[0]["policy"], points[-2]["policy"], points[-1]["policy"]] == ["every version", "never", "auto"]
    assert points[0]["accepted_per_step_kept"] == 1.0
    figures: list[Figure] = [*_costs(COSTS), *_figures("mixed", outcomes), *_figures("ordered", outcomes)]
    about = {"traffic": {"requests": 24, "tokens": 24_000}}
    report = Report("sync", {"processor": "one", "cores": 2}, "code", about, tuple(figures))
    html = page({"ordered": outcomes, "mixed": outcomes}, report)
    assert html.count("<svg") == 2
    assert all(point["policy"] in html for point in points)
    ET.fromstring(frontier("mixed", outcomes))


def test_without_recorded_traffic_the_command_that_records_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = write_tiny_target(tmp_path / "target")
    told = CliRunner().invoke(app, ["bench", "sync", "--set", f"target.path={target}"])
    assert told.exit_code == 2
    assert "aurora bench learning --record" in told.stderr
