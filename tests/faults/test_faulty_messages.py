"""Fault campaign: messages are truncated, bit-flipped, duplicated and reordered."""

from __future__ import annotations

from collections.abc import Callable

from campaign import FAULT_RATIO, Campaign
from traffic import MESSAGE_FAULTS

from schemas.settings import Settings


def test_corrupted_messages_become_dead_letters_and_reordered_ones_rows(
    new_campaign: Callable[..., Campaign], settings: Settings, full: bool
) -> None:
    requests, share = (1_500, FAULT_RATIO) if full else (60, 0.4)
    campaign = new_campaign(settings, fault_ratio=share)
    with campaign.publishing(requests, pause_s=0):
        pass
    with campaign.worker():
        campaign.settle()
    result = campaign.conclude()
    assert all(campaign.message_faults[how] for how in MESSAGE_FAULTS)
    assert result.dead_letters == campaign.message_faults.total() - campaign.message_faults["reordered"]
