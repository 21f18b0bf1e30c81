"""Fault campaign: workers join and leave the group, and two workers may believe that they own a partition."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM

import pytest
from campaign import Campaign

from schemas.settings import Settings


@pytest.mark.timeout(1800)
def test_no_row_is_lost_when_workers_join_leave_and_freeze(
    new_campaign: Callable[..., Campaign],
    settings: Settings,
    tmp_path: Path,
    free_port: Callable[[], int],
    full: bool,
) -> None:
    visits, freezes, requests = (10, 3, 1_500) if full else (1, 0, 20)
    partitions = settings.kafka.partitions
    campaign = new_campaign(settings)
    with campaign.worker() as first:
        with campaign.publishing(requests, pause_s=0.1):
            for visit in range(visits):
                first.await_status(lambda status: len(status.partitions) == partitions and status.commits > 0)
                with campaign.worker(settings_for_second_worker(settings, tmp_path, free_port())) as second:
                    second.await_commit()
                    campaign.inject("second worker joined")
                    time.sleep(campaign.random.uniform(0, 2))
                    if visit < freezes:
                        first.signal(SIGSTOP)
                        campaign.inject("first worker frozen")
                        second.await_status(lambda status: len(status.partitions) == partitions)
                        second.await_progress()
                        first.signal(SIGCONT)
                        first.await_progress()
                    second.end(SIGKILL if visit % 2 else SIGTERM)
                    campaign.inject("second worker left")
        campaign.settle()
    campaign.conclude()


def settings_for_second_worker(settings: Settings, folder: Path, port: int) -> Settings:
    """Return settings for another worker of the same group."""
    stream = settings.stream.model_copy(update={"port": port, "data_dir": str(folder / f"worker-{port}")})
    return settings.model_copy(update={"stream": stream})
