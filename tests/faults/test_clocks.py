"""Fault campaign: the clock of the worker jumps by hours and days, and the clocks of nodes are wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from campaign import Campaign
from libfaketime import get_reload_information

from schemas.settings import Settings

HOUR_S, DAY_MS = 3_600, 86_400_000
JUMPS_S = (2 * HOUR_S, -400 * 24 * HOUR_S, 40 * 24 * HOUR_S, -5 * HOUR_S, 0, 1)
NODES_MS = (0, -700 * DAY_MS, 700 * DAY_MS, -90 * 60_000, 90 * 60_000)


@pytest.mark.timeout(1800)
def test_no_row_is_lost_when_clocks_jump_or_are_wrong(
    new_campaign: Callable[..., Campaign], settings: Settings, tmp_path: Path, full: bool
) -> None:
    jumps, requests = (3 * JUMPS_S, 800) if full else (JUMPS_S[:3], 20)
    campaign, clock = new_campaign(settings, clocks=NODES_MS), Clock(tmp_path / "clock")
    for _ in filter(None, NODES_MS):
        campaign.inject("node with a wrong clock")
    with campaign.worker(variables=clock.variables) as worker:
        with campaign.publishing(requests, pause_s=0.1):
            for jump_s in jumps:
                worker.await_progress()
                clock.jump(jump_s)
                campaign.inject("clock jumped")
                time.sleep(campaign.random.uniform(0, 2))
            worker.await_progress()
        campaign.settle()
    campaign.conclude()


class Clock:
    """The wall clock of a process, faked by libfaketime. Its monotonic clock is not affected."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.jump(0)

    @property
    def variables(self) -> Mapping[str, str]:
        """Environment variables of the process."""
        _, preload = get_reload_information()
        return {**preload, "FAKETIME_TIMESTAMP_FILE": str(self._file), "FAKETIME_DONT_RESET": "1"}

    def jump(self, offset_s: int) -> None:
        """Set the offset of the clock."""
        written = self._file.with_suffix(".new")
        written.write_text(f"{offset_s:+d}")
        written.replace(self._file)  # replaced atomically, because the process reads it at every call
