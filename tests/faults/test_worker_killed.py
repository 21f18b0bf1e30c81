"""The stream worker is killed again and again while traffic runs."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
from campaign import Campaign

from schemas.settings import Settings


@pytest.mark.timeout(3600)
def test_a_worker_may_be_killed_at_any_moment(
    new_campaign: Callable[..., Campaign], settings: Settings, full: bool
) -> None:
    kills, requests, pause_s = (30, 4_200, 0.04) if full else (2, 20, 0.1)
    campaign = new_campaign(settings)
    with campaign.worker() as worker:
        with campaign.publishing(requests, pause_s):
            while campaign.faults["worker killed"] < kills:
                # Not before it wrote something, so that every kill meets a worker at work; then at any moment.
                worker.await_commit()
                time.sleep(campaign.random.uniform(0, 3))
                if worker.signal(signal.SIGKILL):
                    campaign.inject("worker killed")
                    if campaign.torn():
                        campaign.inject("of these between the commits of two tables")
        campaign.settle()
    campaign.conclude()
