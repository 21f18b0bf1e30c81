"""Metrics that every process exports, ``aurora_build_info`` and ``process_*``, and counters by label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily

from schemas.build_info import code_revision, package_version


def register_process_metrics(registry: CollectorRegistry) -> None:
    """Register the build info and the process's CPU, memory, file and start-time metrics."""
    ProcessCollector(registry=registry)
    build_info = Gauge(
        "aurora_build_info", "Always 1; the labels name the running code.", ["version", "revision"], registry=registry
    )
    build_info.labels(package_version(), code_revision()).set(1)


def counter_by(name: str, text: str, label: str, values: Iterable[str], registry: CollectorRegistry) -> Counter:
    """Return a counter whose series begin at zero.

    Prometheus sees no increase in the first sample of a series: an alert would miss the first event of each kind.

    Args:
        name: Without ``_total``.
        text: What is counted.
        label: Name of the label.
        values: All values that the label can have.
        registry: Takes the counter.
    """
    counter = Counter(name, text, [label], registry=registry)
    for value in values:
        counter.labels(value)
    return counter


def counts_by(name: str, text: str, label: str, values: Iterable[str], counts: Mapping[str, int]) -> Metric:
    """Return the samples of such a counter, from counts that lack what has not happened."""
    family = CounterMetricFamily(name, text, labels=[label])
    for value in dict.fromkeys([*values, *counts]):
        family.add_metric([value], counts.get(value, 0))
    return family
