"""Dashboards, alerts and docs name only metrics that a process exports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from echo_engine import EchoEngine
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_server import ROOT, RULES
from promoter_world import World
from trace_bench import Bench
from version_registry import FakeRegistry

from ops.deploy.monitoring.dashboards import loop
from pipeline.metrics import exposition
from schemas.settings import Settings
from schemas.status import DriftStatus, StreamStatus
from schemas.telemetry.metrics import register_process_metrics
from serving.engines.sglang.plugin.metrics import PluginMetrics
from serving.http.generation import RequestMetrics
from serving.http.status import EngineMetrics
from serving.versions.poller import VersionPoller
from trainer.loop.metrics import TrainMetrics
from trainer.status import ErrorTracker

DOCS = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
NAME = re.compile(r"\baurora_(?:serve|sglang|stream|train|promoter|build)_[a-z0-9_]*[a-z0-9]\b")
STREAM_STATUS = StreamStatus(
    partitions=[],
    rows_written=0,
    consumed_bytes=0,
    dead_letters={},
    chunk_gaps=0,
    records_skipped=0,
    records_deferred=0,
    seeks=0,
    commits=0,
    last_commit_time=1.0,
    commits_fenced=0,
    table_errors=0,
    records_lost=0,
    buffer_bytes=0,
    not_live=[],
    not_ready=[],
    drift=DriftStatus(detected=0, dropped=0, failed=0, newest=[], traffic=[]),
    maintenance_files={},
    error=None,
)


def families(folder: Path) -> Iterator[Metric]:
    """Yield every metric family of every process."""
    common, serve, sglang, train = (CollectorRegistry() for _ in range(4))
    register_process_metrics(common)
    RequestMetrics(serve)
    PluginMetrics(sglang)
    TrainMetrics(train)
    ErrorTracker("train", train)
    bench, engine = Bench(), EchoEngine()
    bench.publisher.close(0)
    poller = VersionPoller(FakeRegistry(), engine, Settings())
    for source in (
        common,
        serve,
        EngineMetrics(engine),
        bench.publisher,
        poller,
        sglang,
        train,
        World(folder).promoter.metrics,
    ):
        yield from source.collect()
    yield from text_string_to_metric_families(exposition(STREAM_STATUS).decode())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of all samples."""
    found = families(tmp_path_factory.mktemp("tables"))
    return {family.name + suffix for family in found for suffix in SUFFIXES[family.type]}


def unknown(text: str, exported: set[str]) -> set[str]:
    return set(NAME.findall(text)) - exported


def test_panels_and_annotations_query_exported_metrics(exported: set[str]) -> None:
    queries = [*loop.queries(), *(query for query, _ in loop.ANNOTATIONS.values())]
    assert len({name for query in queries for name in NAME.findall(query)}) > 30
    assert {query: names for query in queries if (names := unknown(query, exported))} == {}


def test_panels_show_acceptance_length_with_the_bonus_token() -> None:
    panels = {panel.title: panel for panels in loop.ROWS.values() for panel in panels}
    (query,) = panels["Acceptance length"].queries
    assert query.promql.startswith("1 + ")
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
