"""Fault campaign: the stream worker is killed repeatedly."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
from campaign import Campaign

from schemas.settings import Settings


@pytest.mark.timeout(3600)
def test_no_row_is_lost_when_a_worker_is_killed(
    new_campaign: Callable[..., Campaign], settings: Settings, full: bool
) -> None:
    kills, requests, pause_s = (30, 4_200, 0.04) if full else (2, 20, 0.1)
    campaign = new_campaign(settings)
    with campaign.worker() as worker:
        with campaign.publishing(requests, pause_s):
            while campaign.faults["worker killed"] < kills:
                # Wait for a commit, so that every kill affects a working process; then kill it at a random moment.
                worker.await_commit()
                time.sleep(campaign.random.uniform(0, 3))
                if worker.signal(signal.SIGKILL):
                    campaign.inject("worker killed")
                    if campaign.has_torn_commit():
                        campaign.inject("worker killed between the commits of two tables")
        campaign.settle()
    campaign.conclude()
