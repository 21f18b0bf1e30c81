"""An audit without answers never counts as clean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ops.deploy.package_audit import NOT_AUDITED, main

CLEAN: dict[str, Any] = {"name": "a", "version": "1", "vulns": []}
BROKEN: dict[str, Any] = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
SKIPPED: dict[str, Any] = {"name": "c", "skip_reason": "not found"}


def program(folder: Path, answer: str, code: int = 0) -> str:
    """Return a stand-in for pip-audit with this answer."""
    path = folder / "pip-audit"
    path.write_text(f"#!/bin/sh\ncat <<'E'\n{answer}\nE\necho 'no way to the service' >&2\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("packages", "code", "word"),
    [
        ([CLEAN], 0, "no known vulnerabilities; 1 packages"),
        ([CLEAN, BROKEN, SKIPPED], 1, "b 2: CVE-1, fixed in 3"),
        ([CLEAN, SKIPPED], NOT_AUDITED, "NOT AUDITED; 1 packages"),
        ([], NOT_AUDITED, "NOT AUDITED; 0 packages"),
    ],
)
def test_a_report_decides_exit_code_and_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], packages: list[dict[str, Any]], code: int, word: str
) -> None:
    pip_audit = program(tmp_path, json.dumps({"dependencies": packages}))
    assert main([pip_audit, "requirements/a.txt"]) == code
    assert word in capsys.readouterr().out
    assert main([pip_audit, "--allow-unaudited", "requirements/a.txt"]) == (1 if code == 1 else 0)


def test_an_unreachable_service_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pip_audit = program(tmp_path, "not JSON", 1)
    assert main([pip_audit, "a.txt", "b.txt"]) == NOT_AUDITED
    output = capsys.readouterr().out
    assert output.count("NOT AUDITED") == 2
    assert "no way to the service" in output
    assert main([pip_audit, "--allow-unaudited", "a.txt"]) == 0
    assert "NOT AUDITED" in capsys.readouterr().out
