"""Metrics that every process exports."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from schemas.build_info import code_revision, package_version
from schemas.telemetry.metrics import register_process_metrics


def test_build_info_and_process_metrics_are_exported() -> None:
    registry = CollectorRegistry()
    register_process_metrics(registry)
    text = generate_latest(registry).decode()
    assert f'aurora_build_info{{revision="{code_revision()}",version="{package_version()}"}} 1.0' in text
    assert "process_resident_memory_bytes" in text
