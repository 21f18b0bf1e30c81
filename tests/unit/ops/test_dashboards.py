"""Dashboard, alerts and runbook agree with each other and with what the processes count."""

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


def counted() -> set[str]:
    """Names that code gives to metrics, without what the client adds; some are put together from two parts."""
    text = "\n".join(file.read_text() for file in CODE)
    parts = set(re.findall(r'"([a-z_]+)"', text)) | set(re.findall(r"aurora_\{\w+\}_([a-z_]+)", text))
    return (
        {f"aurora_{name}" for name in parts}
        | {f"aurora_{process}_{name}" for process in ("serve", "stream", "train", "promoter") for name in parts}
        | set(re.findall(r'"(aurora_[a-z_]+)"', text))
    )


def named_in(query: str) -> set[str]:
    return {re.sub(r"_(total|bucket)$", "", name) for name in re.findall(r"aurora_[a-z_]+", query)}


def test_the_dashboard_that_is_kept_is_the_one_that_the_code_builds() -> None:
    assert loop.FILE.read_text() == loop.build(), "python -m ops.deploy.monitoring.dashboards.loop"


def test_pictures_ask_for_what_processes_count() -> None:
    asked = {name for query in loop.queries() for name in named_in(query)}
    assert len(asked) > 30
    assert asked - counted() == set()


def test_marks_ask_for_what_processes_count() -> None:
    assert {name for query, _ in loop.ANNOTATIONS.values() for name in named_in(query)} - counted() == set()


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_an_alert_asks_for_what_is_counted_and_has_its_entry_in_the_runbook(rule: dict[str, dict[str, str]]) -> None:
    assert named_in(str(rule["expr"])) - counted() == set()
    file, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^### (\S+)$", (ROOT / file).read_text(), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]
    assert rule["labels"]["severity"] in {"page", "ticket", "info"}


def test_the_runbook_has_no_entry_without_an_alert() -> None:
    headings = re.findall(r"^### (\S+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(rule["alert"] for rule in ALERTS)


@needs_prometheus
def test_each_alert_fires_on_what_it_is_for() -> None:
    tests = yaml.safe_load((RULES.parent / "aurora.test.yml").read_text())["tests"]
    fired = {case["alertname"] for one in tests for case in one["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in ALERTS}
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(RULES.parent / "aurora.test.yml")]):
        run = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr


@needs_prometheus
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    config = (ROOT / "ops/deploy/monitoring/prometheus/prometheus.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(config.replace("/etc/prometheus/aurora.rules.yml", str(RULES)))
    run = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
