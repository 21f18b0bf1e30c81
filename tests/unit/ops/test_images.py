"""The images hold the processes and the health probe, and no benchmarks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.deploy.probe import probe

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILES = sorted((ROOT / "ops/deploy/images").glob("*.Dockerfile"))


def copies(dockerfile: Path) -> Iterator[tuple[list[str], str]]:
    """Yield sources and destination of each COPY from the build context."""
    for line in dockerfile.read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            *sources, destination = line.split()[1:]
            yield sources, destination


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_everything_that_is_copied_exists(dockerfile: Path) -> None:
    for sources, _ in copies(dockerfile):
        for source in sources:
            pattern = re.sub(r"\$\{\w+\}", "*", source)
            assert list(ROOT.glob(pattern)), f"{dockerfile.name}: {source}"


def test_the_build_context_has_no_benchmarks() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert "ops/bench" in ignored
    assert (ROOT / "ops/bench").is_dir(), "the pattern matches nothing"


def test_the_registry_image_runs_the_probe(tmp_path: Path) -> None:
    dockerfile = ROOT / "ops/deploy/images/registry.Dockerfile"
    for sources, destination in copies(dockerfile):
        folder = tmp_path / destination.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            shutil.copy(ROOT / source, folder)
    found = re.search(r"PYTHONPATH=(\S+)", dockerfile.read_text())
    assert found is not None
    command = [sys.executable, "-S", "-m", "ops.deploy.probe", "http://127.0.0.1:1/health"]
    environ = {"PYTHONPATH": str(tmp_path / found[1].lstrip("/"))}
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environ)
    assert run.returncode == 1
    assert "Connection refused" in run.stderr
    assert "refused" in probe("http://127.0.0.1:1/health")
