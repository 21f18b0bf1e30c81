"""The demo as a user runs it: promotes a version, fails no request, accounts for all rows, leaves no process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
from prometheus_server import Prometheus

from ops.deploy.monitoring.dashboards import loop

MINUTES = 6


@pytest.mark.timeout(MINUTES * 60 + 600)
def test_a_speculator_learns_from_live_traffic(tmp_path: Path, smollm2: Path, free_port: Callable[[], int]) -> None:
    flags: dict[str, object] = {f"{part}.port": free_port() for part in ("serve", "stream", "train", "promoter")}
    flags |= {f"stack.{name}_port": free_port() for name in ("kafka", "kafka_controller", "mlflow")}
    flags |= {"target.path": str(smollm2), "train.registration_interval": 20, "promoter.gate_min_samples": 2}
    command = [sys.executable, "-m", "ops.cli.main", "demo", "--fresh", "--minutes", str(MINUTES), "--no-ui"]
    # No drafting settings: the demo drafts in every verify step only if the user sets none of them.
    command += [f"--set={name}={value}" for name, value in flags.items()]

    processes = {part: int(str(flags[f"{part}.port"])) for part in ("serve", "stream", "train", "promoter")}
    prometheus = Prometheus(tmp_path / "prometheus", free_port(), processes) if shutil.which("prometheus") else None
    with prometheus.running() if prometheus else nullcontext():
        demo = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        if prometheus:
            check_pictures(prometheus)

    result = demo.stdout + demo.stderr
    figures = json.loads((tmp_path / ".aurora/demo/summary.json").read_text())
    assert demo.returncode == 0, result
    assert figures["failed_requests"] == 0
    assert figures["lossless_checked"] >= 20
    assert figures["lossless_mismatches"] == 0
    assert figures["rows_published"] > 0
    assert figures["rows_published"] == figures["rows_in_table"] + figures["rows_dropped"] + figures["rows_dead"]
    assert figures["versions_promoted"] >= 1, result
    assert any(swap["in_flight"] > 0 for swap in figures["swaps"]), result
    # A random draft of this vocabulary is right about once in 8,192 tokens: what is accepted was learned. A slow
    # machine may answer fewer than fifty requests, so the first fifty and the last are not compared.
    assert figures["acceptance_length_last_50"] > 1.02, result
    assert "<svg" in (tmp_path / ".aurora/demo/report.html").read_text()
    assert not working_in(tmp_path.resolve())


def check_pictures(prometheus: Prometheus) -> None:
    """Check that every dashboard query returned numbers during the demo, and that the alert rules load.

    Two queries are empty: a node that always drafts computes no expected rates, and the demo runs no canary.
    """
    queries = [query.replace("$__rate_interval", "10s") for query in loop.queries()]
    silent = [query for query in queries if not prometheus.values(query)]
    assert sorted(silent) == [
        "aurora_promoter_canary_difference_ratio",
        'aurora_serve_expected_tokens_per_second{draft_depth="0"}',
    ]
    assert prometheus.alerts()
    assert max(prometheus.values("sum(rate(aurora_serve_output_tokens_total[10s]))")) > 0
    assert max(prometheus.values("aurora_serve_version_swaps_total")) >= 1


def working_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
