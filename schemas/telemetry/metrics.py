"""Metrics that every process exports: ``aurora_build_info`` and ``process_*``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from schemas.build_info import code_revision, package_version


def register_process_metrics(registry: CollectorRegistry) -> None:
    """Register the build info and the process's CPU, memory, file and start-time metrics."""
    ProcessCollector(registry=registry)
    build_info = Gauge(
        "aurora_build_info", "Always 1; the labels name the running code.", ["version", "revision"], registry=registry
    )
    build_info.labels(package_version(), code_revision()).set(1)
