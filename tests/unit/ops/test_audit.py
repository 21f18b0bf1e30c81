"""An audit that could ask nobody is never one that found nothing."""

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
    """A stand-in for pip-audit that answers so."""
    path = folder / "pip-audit"
    path.write_text(f"#!/bin/sh\ncat <<'E'\n{answer}\nE\necho 'no way to the service' >&2\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("packages", "code", "word"),
    [
        ([CLEAN], 0, "nothing known; 1 packages"),
        ([CLEAN, BROKEN, SKIPPED], 1, "b 2: CVE-1, fixed in 3"),
        ([CLEAN, SKIPPED], NOT_AUDITED, "NOT AUDITED; 1 packages"),
        ([], NOT_AUDITED, "NOT AUDITED; 0 packages"),
    ],
)
def test_what_a_report_comes_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], packages: list[dict[str, Any]], code: int, word: str
) -> None:
    asked = program(tmp_path, json.dumps({"dependencies": packages}))
    assert main([asked, "requirements/a.txt"]) == code
    assert word in capsys.readouterr().out
    assert main([asked, "--go-on", "requirements/a.txt"]) == (1 if code == 1 else 0)


def test_a_service_that_cannot_be_reached_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = program(tmp_path, "not JSON", 1)
    assert main([asked, "a.txt", "b.txt"]) == NOT_AUDITED
    told = capsys.readouterr().out
    assert told.count("NOT AUDITED") == 2
    assert "no way to the service" in told
    assert main([asked, "--go-on", "a.txt"]) == 0
    assert "NOT AUDITED" in capsys.readouterr().out
