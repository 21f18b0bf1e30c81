"""Dashboard, alerts and runbook agree with each other and with the exported metrics."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_server import ROOT, RULES, needs_prometheus

from ops.deploy.monitoring.dashboards import loop

CODE = [file for folder in ("serving", "pipeline", "trainer") for file in (ROOT / folder).rglob("*.py")]
ALERTS = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]


def exported() -> set[str]:
    """Return the metric names in the code, without the client's suffixes; some are composed of two parts."""
    text = "\n".join(file.read_text() for file in CODE)
    parts = set(re.findall(r'"([a-z_]+)"', text)) | set(re.findall(r"aurora_\{\w+\}_([a-z_]+)", text))
    return (
        {f"aurora_{name}" for name in parts}
        | {f"aurora_{process}_{name}" for process in ("serve", "stream", "train", "promoter") for name in parts}
        | set(re.findall(r'"(aurora_[a-z_]+)"', text))
    )


def named_in(query: str) -> set[str]:
    return {re.sub(r"_(total|bucket)$", "", name) for name in re.findall(r"aurora_[a-z_]+", query)}


def test_the_dashboard_file_is_up_to_date() -> None:
    assert loop.FILE.read_text() == loop.build(), "python -m ops.deploy.monitoring.dashboards.loop"


def test_panels_query_exported_metrics() -> None:
    queried = {name for query in loop.queries() for name in named_in(query)}
    assert len(queried) > 30
    assert queried - exported() == set()


def test_annotations_query_exported_metrics() -> None:
    assert {name for query, _ in loop.ANNOTATIONS.values() for name in named_in(query)} - exported() == set()


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_an_alert_queries_exported_metrics_and_has_an_entry_in_the_runbook(rule: dict[str, dict[str, str]]) -> None:
    assert named_in(str(rule["expr"])) - exported() == set()
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
