"""Fault campaign: producers of transactions, some of them aborted, write to the topic of the nodes."""

from __future__ import annotations

from collections.abc import Callable
from signal import SIGKILL

from campaign import Campaign
from stream_worker import offsets_never_read, offsets_without_record

from pipeline.delta import DeltaLog
from pipeline.offsets import HOLE
from schemas.settings import Settings


def test_transactions_among_continuous_traffic_lose_no_record_and_stop_no_partition(
    new_campaign: Callable[..., Campaign], settings: Settings, full: bool
) -> None:
    requests, kills = (1_500, 12) if full else (60, 1)
    campaign = new_campaign(settings)
    with campaign.worker() as worker:
        with campaign.publishing(requests), campaign.transactions():
            for _ in range(kills):
                for _ in range(5):
                    worker.await_progress()
                campaign.inject("worker killed")
                worker.signal(SIGKILL)
            worker.await_progress()
        campaign.settle()
        worker.await_status(lambda status: bool(status.partitions) and not any(p.lag for p in status.partitions))
        assert worker.counts["unexpected exits"] == 0
    campaign.conclude()
    assert campaign.faults["transaction aborted"]
    holes = offsets_never_read(DeltaLog(settings.tables), HOLE)
    assert holes == offsets_without_record(settings, campaign.ledger)
