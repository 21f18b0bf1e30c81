"""Dashboards, alerts and docs name only metrics that a process exports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from exported import exported_metrics, registries
from prometheus_server import ROOT, RULES

from ops.deploy.monitoring.dashboards import loop

DOCS = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
SUFFIXES = {"counter": ("",), "histogram": ("_bucket", "_count", "_sum", ""), "gauge": ("",)}
NAME = re.compile(r"\baurora_(?:serve|sglang|vllm|stream|train|promoter|build)_[a-z0-9_]*[a-z0-9]\b")


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Names of all samples."""
    metrics = [metric for registry in registries().values() for metric in exported_metrics(registry)]
    return {metric.name + suffix for metric in metrics for suffix in SUFFIXES[metric.kind]}


def unknown(text: str, exported: set[str]) -> set[str]:
    return set(NAME.findall(text)) - exported


def test_every_counter_starts_at_zero() -> None:
    """An alert sees no increase in the first sample of a series. Hooks add their names when they are installed."""
    counters = [family for one in registries().values() for family in one.collect() if family.type == "counter"]
    empty = {family.name for family in counters if not [s for s in family.samples if s.name.endswith("_total")]}
    assert len(counters) > 60
    assert empty == {"aurora_sglang_hook_errors", "aurora_vllm_hook_errors"}


def test_tests_of_alerts_use_label_values_that_are_exported() -> None:
    samples = [sample for one in registries().values() for family in one.collect() for sample in family.samples]
    known = {(sample.name, label, value) for sample in samples for label, value in sample.labels.items()}
    series = re.findall(r"(aurora_\w+_total)\{(.*?)\}", (RULES.parent / "aurora.test.yml").read_text())
    used = {
        (name, *pair) for name, labels in series for pair in re.findall(r'(reason|outcome|part|alias)="(\w+)"', labels)
    }
    assert len(used) > 4
    assert used - known == set()


def test_panels_and_annotations_query_exported_metrics(exported: set[str]) -> None:
    queries = [*loop.queries(), *(query for query, _ in loop.ANNOTATIONS.values())]
    assert len({name for query in queries for name in NAME.findall(query)}) > 30
    assert {query: names for query in queries if (names := unknown(query, exported))} == {}


def test_panels_show_acceptance_length_with_the_bonus_token() -> None:
    panels = {panel.title: panel for panels in loop.ROWS.values() for panel in panels}
    queries = panels["Acceptance length"].queries
    assert len(queries) == 2
    assert all(query.promql.startswith("1 + ") for query in queries)
    assert "aurora_train_acceptance_length" in loop.queries()


@pytest.mark.parametrize("file", ["aurora.rules.yml", "aurora.test.yml"])
def test_alerts_and_their_tests_query_exported_metrics(exported: set[str], file: str) -> None:
    text = (RULES.parent / file).read_text()
    assert NAME.search(text)
    assert unknown(text, exported) == set()


def test_alerts_query_every_series_of_their_tests() -> None:
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    queried = {name for rule in rules for name in NAME.findall(rule["expr"])}
    assert set(NAME.findall((RULES.parent / "aurora.test.yml").read_text())) <= queried


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_docs_name_exported_metrics(exported: set[str], path: Path) -> None:
    assert unknown(path.read_text(), exported) == set()
