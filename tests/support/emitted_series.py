"""Series that the processes' own collectors emitted at simulated times, and the alerts that promtool finds in them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Collection
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from prometheus_server import RULES

INTERVAL_S = 60
"""Seconds between two scrapes."""


class EmittedSeries:
    """Scrapes of all targets, one of each target in an interval.

    promtool's clock begins at 0, so Unix times are written as seconds since the first scrape.

    Args:
        start: Unix time of the first scrape.
    """

    def __init__(self, start: float) -> None:
        self._start = start
        self._series: dict[str, dict[int, float]] = {}
        self.scrapes = 0
        """Intervals that have ended."""

    def add(self, job: str, instance: str, text: str) -> None:
        """Add what a target's ``/metrics`` answered in the current interval."""
        target = {"job": job, "instance": instance}
        self._put("up", target, 1)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                shift = self._start if sample.name.endswith("_timestamp_seconds") else 0.0
                self._put(sample.name, {**sample.labels, **target}, sample.value - shift)

    def end_interval(self) -> None:
        """Go on to the next interval."""
        self.scrapes += 1

    def assert_firing(self, expected: Collection[str], folder: Path) -> None:
        """Check that exactly these alerts fire at the last scrape."""
        last = self.scrapes - 1
        inputs = [
            {"series": name, "values": " ".join(_format(values.get(i)) for i in range(self.scrapes))}
            for name, values in self._series.items()
        ]
        samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(expected)]
        query = {
            "expr": 'count by (alertname) (ALERTS{alertstate="firing"}) > bool 0',
            "eval_time": f"{last * INTERVAL_S}s",
            "exp_samples": samples,
        }
        test = {"interval": f"{INTERVAL_S}s", "input_series": inputs, "promql_expr_test": [query]}
        file = folder / "emitted.test.yml"
        file.write_text(
            json.dumps({"rule_files": [str(RULES)], "evaluation_interval": f"{INTERVAL_S}s", "tests": [test]})
        )
        run = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr

    def _put(self, name: str, labels: dict[str, str], value: float) -> None:
        pairs = ", ".join(f"{label}={json.dumps(text)}" for label, text in sorted(labels.items()))
        self._series.setdefault(f"{name}{{{pairs}}}", {})[self.scrapes] = value


def _format(value: float | None) -> str:
    return "_" if value is None else repr(value)
