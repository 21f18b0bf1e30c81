"""A Prometheus server for tests: Debian's package, if it is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "ops/deploy/monitoring/alerts/aurora.rules.yml"

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus and promtool are not installed (Debian: apt-get install prometheus)",
)


def write_fast_rules(file: Path) -> Path:
    """Write our rules with a second for each minute: in ranges, delays and the ages that they compare."""

    def shorten(match: re.Match[str]) -> str:
        seconds = int(match[2]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[3]] / 60
        return f"{match[1]}{max(round(seconds), 1)}s"

    text = re.sub(r"(\[|for: |offset )(\d+)([smhd])\b", shorten, RULES.read_text())
    file.write_text(re.sub(r"(seconds\)? > )(\d+)", lambda match: f"{match[1]}{int(match[2]) // 60}", text))
    return file


class Prometheus:
    """Scrapes targets every second and evaluates rules, ours by default."""

    def __init__(self, folder: Path, port: int, targets: Mapping[str, int], rules: Path = RULES) -> None:
        self.folder, self.url = folder, f"http://127.0.0.1:{port}"
        folder.mkdir(parents=True, exist_ok=True)
        scraped = [
            {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
            for job, target in targets.items()
        ]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": scraped,
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self.command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        with (self.folder / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(self.command, stdout=log, stderr=log)
        try:
            self._wait()
            yield
        finally:
            process.terminate()
            process.wait(30)

    def values(self, query: str, over: str = "30s") -> list[float]:
        """Return the values of a query since the start, of every series."""
        end = time.time()
        answer = self._get("/api/v1/query_range", query=query, start=end - 1800, end=end, step=over)
        return [float(value) for curve in answer["data"]["result"] for _, value in curve["values"]]

    def alerts(self) -> list[str]:
        """Return the names of the loaded rules."""
        groups = self._get("/api/v1/rules")["data"]["groups"]
        return [rule["name"] for group in groups for rule in group["rules"] if rule["health"] != "err"]

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire now."""
        found = self._get("/api/v1/query", query='ALERTS{alertstate="firing"}')["data"]["result"]
        return {one["metric"]["alertname"] for one in found}

    def fired(self) -> set[str]:
        """Return the names of the alerts that fired in the last half hour."""
        query = 'count by (alertname) (count_over_time(ALERTS{alertstate="firing"}[30m]))'
        return {one["metric"]["alertname"] for one in self._get("/api/v1/query", query=query)["data"]["result"]}

    def _get(self, path: str, **parameters: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=2).close()
                return
            time.sleep(0.1)
        raise AssertionError((self.folder / "prometheus.log").read_text())
