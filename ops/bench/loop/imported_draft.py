"""A trained draft as the first champion of a loop, by the commands with which a fleet imports its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ops.bench.speculator import cache_folder
from schemas.errors import UserError
from schemas.settings import Settings, to_environ
from schemas.speculator.checkpoint import CONFIG


def find_draft(settings: Settings, name: str) -> Path:
    """Return the folder of the cached speculator of that name, or the folder of that name.

    Raises:
        UserError: neither holds a draft.
    """
    cached = cache_folder(settings, name)
    for folder in (cached, Path(name)):
        if (folder / CONFIG).exists():
            return folder.resolve()
    raise UserError(f"--import {name}: no draft in {cached} or {name}; `aurora bench speculator` trains one")


def import_draft(settings: Settings, folder: Path) -> str:
    """Register the draft of a folder, make it champion, and return its version.

    Raises:
        UserError: a command failed, or the draft is not of the settings' line, or the line has versions already.
    """
    found: dict[str, Any] = json.loads(_run_versions(settings, "import", str(folder), "--json"))
    if not found["line_of_settings"]:
        raise UserError(
            f"--import {folder}: its line {found['line']} is not that of the settings; set speculator.* and "
            "target.path as in its training"
        )
    version = str(found["version"])
    if version != "1":
        raise UserError(f"--import {folder}: line {found['line']} has versions of an earlier run; add --fresh")
    _run_versions(settings, "promote", version, "--line", found["line"], "--force", "--why", "imported")
    return version


def _run_versions(settings: Settings, *arguments: str) -> str:
    """Run ``aurora versions`` and return its output."""
    command = [sys.executable, "-m", "ops.cli.main", "versions", *arguments]
    ended = subprocess.run(command, env=os.environ | to_environ(settings), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise UserError(f"aurora versions {' '.join(arguments)}: {ended.stderr.strip()}")
    return ended.stdout
