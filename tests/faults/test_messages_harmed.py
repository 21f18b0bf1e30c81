"""Messages are truncated, bit-flipped, duplicated and reordered on their way."""

from __future__ import annotations

from collections.abc import Callable

from campaign import HARMED_SHARE, Campaign
from traffic import HARMS

from schemas.settings import Settings


def test_harmed_messages_become_dead_letters_and_reordered_ones_rows(
    new_campaign: Callable[..., Campaign], settings: Settings, full: bool
) -> None:
    requests, share = (1_500, HARMED_SHARE) if full else (60, 0.4)
    campaign = new_campaign(settings, harmed_share=share)
    with campaign.publishing(requests, pause_s=0):
        pass
    with campaign.worker():
        campaign.settle()
    verdict = campaign.conclude()
    assert all(campaign.harmed[how] for how in HARMS)
    assert verdict.dead_letters == campaign.harmed.total() - campaign.harmed["reordered"]
