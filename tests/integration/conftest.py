"""Environments that several integration tests use."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def peers_python() -> Path:
    """The Python that the other projects are installed in; a minute where they are not."""
    subprocess.run(["make", "--no-print-directory", "trainer-peers"], cwd=ROOT, check=True)
    return ROOT / ".venv-peers" / "bin" / "python"
