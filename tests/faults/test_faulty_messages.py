"""Fault campaigns: messages are truncated, bit-flipped, duplicated and reordered, or end the workers that read them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
from campaign import FAULT_RATIO, Campaign
from stream_worker import chunk
from traffic import MESSAGE_FAULTS

from schemas.settings import Settings
from schemas.trace.record import checksum, encode

POISON, CRASHES = 999_999_999, 2
DYING_WORKER = f"""
import os, signal
from pipeline import writer
build, writer.MAX_CRASHES = writer.build, {CRASHES}
def build_or_die(records, *rest):
    records = list(records)
    if any(record.key == b"request-{POISON}" for record in records):
        os.kill(os.getpid(), signal.SIGKILL)
    return build(records, *rest)
writer.build = build_or_die
"""
"""Python code with which a worker dies when it builds rows of the poison."""


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


def build_bomb() -> bytes:
    """Return a message of 35 KB that becomes a gigabyte when it is decompressed."""
    sink = pa.BufferOutputStream()
    schema = pa.schema([pa.field("features", pa.binary())])
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.record_batch([pa.array([bytes(1 << 30)])], schema=schema))
    return bytes(sink.getvalue()) + checksum(sink.getvalue())


def test_records_that_end_workers_become_dead_letters_while_traffic_continues(
    new_campaign: Callable[..., Campaign], settings: Settings, full: bool
) -> None:
    campaign = new_campaign(settings, fault_ratio=0.0)
    bomb, rng = build_bomb(), np.random.default_rng(0)
    poison = chunk(POISON, rng)
    with campaign.worker(before=DYING_WORKER) as worker:
        with campaign.publishing(1_500 if full else 60):
            worker.await_progress()
            campaign.send_poison("record that decompresses to a gigabyte", chunk(POISON - 1, rng), bomb, "too_large")
            campaign.send_poison("record that ends every worker", poison, encode(poison), "crash")
            worker.await_status(lambda status: status.dead_letters.get("crash") == 1)
            worker.await_progress()
        campaign.settle()
        ends = worker.counts["unexpected exits"]
    result = campaign.conclude()
    assert result.dead_letters == 2
    assert CRASHES < ends <= CRASHES + 2
