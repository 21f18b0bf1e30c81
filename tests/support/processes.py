"""State of processes without a waiting parent."""

from __future__ import annotations

from collections.abc import Sequence

import psutil


def gone(processes: Sequence[psutil.Process]) -> bool:
    """Return whether all processes have ended."""
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)
