"""Workers come and go while others work: partitions change hands, and now and then two believe to own one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM

import pytest
from campaign import Campaign

from schemas.settings import Settings


@pytest.mark.timeout(1800)
def test_a_second_worker_may_come_and_go_and_the_first_may_freeze(
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
                with campaign.worker(beside(settings, tmp_path, free_port())) as second:
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


def beside(settings: Settings, folder: Path, port: int) -> Settings:
    """Settings for one more worker of the same group."""
    stream = settings.stream.model_copy(update={"port": port, "data_dir": str(folder / f"worker-{port}")})
    return settings.model_copy(update={"stream": stream})
