"""What became of processes that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence

import psutil


def gone(processes: Sequence[psutil.Process]) -> bool:
    """Whether none of them runs any more."""
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)
