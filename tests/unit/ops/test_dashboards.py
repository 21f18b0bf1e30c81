"""The dashboard file is up to date, and alerts agree with the runbook and their tests."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_server import ROOT, RULES, needs_prometheus

from ops.deploy.monitoring.dashboards import loop

ALERTS = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]


def test_the_dashboard_file_is_up_to_date() -> None:
    assert loop.FILE.read_text() == loop.build(), "python -m ops.deploy.monitoring.dashboards.loop"


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_an_alert_has_an_entry_in_the_runbook(rule: dict[str, dict[str, str]]) -> None:
    file, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^### (\S+)$", (ROOT / file).read_text(), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]
    assert rule["labels"]["severity"] in {"page", "ticket", "info"}


def test_every_entry_of_the_runbook_has_an_alert() -> None:
    headings = re.findall(r"^### (\S+)$", (ROOT / "docs/guides/troubleshooting.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(rule["alert"] for rule in ALERTS)


@needs_prometheus
def test_each_alert_fires_on_its_condition() -> None:
    tests = yaml.safe_load((RULES.parent / "aurora.test.yml").read_text())["tests"]
    fired = {case["alertname"] for one in tests for case in one["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in ALERTS}
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(RULES.parent / "aurora.test.yml")]):
        run = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr


@needs_prometheus
def test_prometheus_accepts_its_configuration(tmp_path: Path) -> None:
    config = (ROOT / "ops/deploy/monitoring/prometheus/prometheus.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(config.replace("/etc/prometheus/aurora.rules.yml", str(RULES)))
    run = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
