"""Version and revision of the running code."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

_PACKAGE = "aurora-stream"


def package_version() -> str:
    """Return the version of the installed package."""
    return metadata.version(_PACKAGE)


@cache
def code_revision() -> str:
    """Return the Git revision of this checkout, or the version of the installed package."""
    try:
        head = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return package_version()
    return head.stdout.strip()
