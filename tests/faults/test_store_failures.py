"""Fault campaign: the object store of the tables fails, behind a proxy that injects network faults."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from campaign import Campaign
from proxy import Fault, Proxy
from restarted_worker import TIMEOUT_S
from stream_worker import wait_until

from ops.bench.object_store import ObjectStore
from schemas.settings import Settings

SHORT_TIMEOUTS = {"timeout": "3s", "connect_timeout": "1s", "max_retries": "2", "retry_timeout": "6s"}
FAULTS: tuple[Fault, ...] = ("answer to a commit lost", "store refused", "store cut off", "store slow", "store silent")


@pytest.fixture
def proxy(object_store: ObjectStore, free_port: Callable[[], int]) -> Iterator[Proxy]:
    server = Proxy(free_port(), object_store.port)
    yield server
    server.close()


@pytest.mark.timeout(1800)
def test_no_row_is_lost_when_the_object_store_fails(
    new_campaign: Callable[..., Campaign], settings: Settings, object_store: ObjectStore, proxy: Proxy, full: bool
) -> None:
    verify_steps, requests, seconds = (4, 800, 15) if full else (1, 20, 3)
    uri = f"{object_store.bucket}/{settings.kafka.traces_topic}"
    direct = tables(settings, uri, object_store.options())
    campaign = new_campaign(direct)
    through_proxy = tables(settings, uri, {**object_store.options(proxy.port), **SHORT_TIMEOUTS})
    with campaign.worker(through_proxy) as worker:
        with campaign.publishing(requests, pause_s=0.1):
            for _ in range(verify_steps):
                for fault in FAULTS:
                    worker.await_progress()
                    with proxy.failing(fault) as met:
                        assert wait_until(met, TIMEOUT_S)
                        time.sleep(campaign.random.uniform(0, seconds))
                    campaign.inject(fault)
        campaign.settle()
    campaign.conclude()
    assert not worker.counts["unexpected exits"], worker.log.read_text()[-5_000:]


def tables(settings: Settings, uri: str, options: dict[str, str]) -> Settings:
    """Return settings with the tables at another address."""
    there = settings.tables.model_copy(update={"uri": uri, "storage_options": options})
    return settings.model_copy(update={"tables": there})
