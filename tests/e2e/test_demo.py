"""The demo as a user runs it: promotes a version, fails no request, accounts for all rows, leaves no process."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_server import Prometheus

from ops.deploy.monitoring.dashboards import loop

MINUTES = 7


@pytest.mark.timeout(MINUTES * 60 + 600)
def test_a_speculator_learns_from_live_traffic(tmp_path: Path, smollm2: Path, free_port: Callable[[], int]) -> None:
    flags: dict[str, object] = {f"{part}.port": free_port() for part in ("serve", "stream", "train", "promoter")}
    flags |= {f"stack.{name}_port": free_port() for name in ("kafka", "kafka_controller", "mlflow")}
    flags |= {"target.path": str(smollm2), "train.registration_interval": 20, "promoter.gate_min_samples": 2}
    command = [sys.executable, "-m", "ops.cli.main", "demo", "--fresh", "--minutes", str(MINUTES), "--no-ui"]
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
    check_speedups(figures, demo.stdout)
    assert "<svg" in (tmp_path / ".aurora/demo/report.html").read_text()
    assert not working_in(tmp_path.resolve())


def check_speedups(figures: dict[str, Any], printed: str) -> None:
    """Check that both ratios were measured and agree with the figures beside them; no size is expected."""
    measured, speedup = figures["measured"], figures["measured_speedup"]
    assert 3 <= len(measured["ratios"]) <= 8
    assert min(measured["ratios"]) <= speedup <= max(measured["ratios"])
    assert measured["tokens_per_s"] / measured["tokens_per_s_no_speculation"] == pytest.approx(speedup, rel=0.5)
    assert (1 + measured["accepted_per_step"]) / measured["relative_step_time"] == pytest.approx(speedup, rel=0.5)
    assert 0 <= measured["suffix_accepted_per_step"] <= measured["accepted_per_step"]
    assert measured["accepted_per_step"] <= measured["draft_tokens_per_step"]
    assert 0 <= measured["other_programs"] <= 1
    assert (measured["slowdown"] is None) == (speedup >= 1)
    assert re.search(r"^\d+\.\d\dx: \d+ -> \d+ tokens/s \(\d trials", printed, re.MULTILINE), printed

    # A slow machine ends the first trials early.
    assert 8 <= figures["first_50_requests"] <= 52
    rates = figures["tokens_per_s_first_50"], figures["tokens_per_s_first_50_no_speculation"]
    assert figures["first_50_ratio"] == pytest.approx(rates[0] / rates[1], abs=0.01)
    accepted = figures["suffix_accepted_per_step_last_50"] + figures["speculator_accepted_per_step_last_50"]
    assert figures["acceptance_length_last_50"] == pytest.approx(1 + accepted, abs=0.01)
    assert figures["acceptance_length_last_50"] > 1.02


def check_pictures(prometheus: Prometheus) -> None:
    """Check that every dashboard query but the canary's returned numbers, and that the alert rules load."""
    queries = [query.replace("$__rate_interval", "10s") for query in loop.queries()]
    silent = [query for query in queries if not prometheus.values(query)]
    assert silent == ["aurora_promoter_canary_difference_ratio"]
    assert prometheus.alerts()
    # The first three are events that may occur in a demo; its processes start after Prometheus and end before it.
    events = {"AuroraDrift", "AuroraVersionRolledBack", "AuroraTrainingRolledBack"}
    assert prometheus.fired() <= events | {"AuroraProcessDown"}
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
