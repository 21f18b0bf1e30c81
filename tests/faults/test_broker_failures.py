"""Fault campaigns: the only broker restarts, and one of three brokers is killed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from campaign import Campaign
from cluster import running
from stream_worker import stream_settings


@pytest.mark.timeout(1200)
def test_no_row_is_lost_when_the_broker_restarts(
    new_campaign: Callable[..., Campaign], tmp_path: Path, free_port: Callable[[], int], full: bool
) -> None:
    restarts, requests = (3, 600) if full else (1, 20)
    with running(tmp_path, 1, free_port) as broker:
        campaign = new_campaign(stream_settings(broker.bootstrap, tmp_path, free_port()))
        with campaign.worker() as worker:
            with campaign.publishing(requests, pause_s=0.1):
                for restart in range(restarts):
                    worker.await_progress()
                    if restart % 2:
                        broker.stop()
                    else:
                        broker.kill(0)
                    time.sleep(campaign.random.uniform(0, 3))
                    broker.start()
                    campaign.inject("broker restarted")
            campaign.settle()
        campaign.conclude()


@pytest.mark.timeout(1200)
def test_no_row_is_lost_when_one_broker_of_three_is_killed(
    new_campaign: Callable[..., Campaign], tmp_path: Path, free_port: Callable[[], int], full: bool
) -> None:
    kills, requests = (3, 600) if full else (1, 20)
    with running(tmp_path, 3, free_port) as brokers:
        settings = stream_settings(brokers.bootstrap, tmp_path, free_port())
        replicated = settings.kafka.model_copy(update={"replication_factor": 3, "partitions": 3})
        campaign = new_campaign(settings.model_copy(update={"kafka": replicated}))
        with campaign.worker() as worker:
            with campaign.publishing(requests, pause_s=0.1):
                for number in range(kills):
                    worker.await_progress()
                    brokers.kill(number)
                    campaign.inject("one broker of three killed")
                    # The other two serve. Then the broker is restarted, and the next one is killed.
                    worker.await_progress()
                    brokers.start()
            campaign.settle()
        campaign.conclude()
        assert not worker.counts["unexpected exits"], worker.log.read_text()[-5_000:]
