"""Fault campaign: the disk of the tables is full for a while."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from campaign import Campaign
from deltalake import DeltaTable

from pipeline.offsets import COMMIT_ORDER
from schemas.settings import Settings


@pytest.fixture
def disk(tmp_path: Path, full: bool) -> Iterator[Path]:
    """Mount a small file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={400 if full else 60}m", "none", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.timeout(1200)
def test_no_row_is_lost_when_the_disk_is_full(
    new_campaign: Callable[..., Campaign], settings: Settings, disk: Path, full: bool
) -> None:
    times, requests = (5, 400) if full else (1, 20)
    there = settings.model_copy(update={"tables": settings.tables.model_copy(update={"uri": str(disk / "tables")})})
    campaign = new_campaign(there)
    with campaign.worker() as worker:
        with campaign.publishing(requests, pause_s=0.1):
            for _ in range(times):
                worker.await_progress()
                ballast = fill(disk / "ballast")
                campaign.inject("disk full")
                worker.await_status(lambda status: "tables.uri" in (status.error or ""))
                # Partly written files must not keep a reader from reading.
                assert all(DeltaTable(f"{there.tables.uri}/{name}").version() for name in COMMIT_ORDER)
                time.sleep(campaign.random.uniform(0, 2))
                ballast.unlink()
                worker.await_status(lambda status: status.error is None)
                worker.await_progress()
        campaign.settle()
    campaign.conclude()
    assert not worker.counts["unexpected exits"], worker.log.read_text()[-5_000:]


def fill(file: Path) -> Path:
    """Fill the file system, in ever smaller pieces, to the last byte."""
    with file.open("wb", buffering=0) as ballast:
        for piece in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while ballast.write(bytes(piece)):
                    pass
    return file
