"""Records and events of other releases: what is read, what is ignored, and what pauses a partition."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from recorded import conversation, record_of

from pipeline.batches import Record
from pipeline.writer import cut_at_other_version
from schemas.events import TrainerLag
from schemas.status import PartitionStatus
from schemas.trace.record import FORMAT


def with_format(offset: int, name: str | None) -> Record:
    record = record_of(f"request-{offset}", conversation(range(9), 4), offset)
    headers = record.headers if name is None else (*record.headers, ("format", name.encode()))
    return replace(record, headers=headers)


@pytest.mark.parametrize("name", [None, FORMAT, "another.format/4", "nonsense"])
def test_records_of_this_major_version_and_of_no_known_format_are_written(name: str | None) -> None:
    records = [with_format(offset, name) for offset in range(3)]
    assert cut_at_other_version(records, ()) == (records, (), None)


@pytest.mark.parametrize("name", ["aurora.trace/4", "aurora.trace/2", "aurora.trace/"])
def test_a_record_of_another_major_version_pauses_its_partition(name: str) -> None:
    records = [with_format(0, FORMAT), with_format(4, None), with_format(9, name), with_format(10, FORMAT)]
    cut = cut_at_other_version(records, (range(1, 4), range(5, 9)))
    assert cut == (records[:2], (range(1, 4),), name)


def test_a_hole_before_a_paused_record_is_written_with_the_records_before_it_only() -> None:
    records = [with_format(3, "aurora.trace/4")]
    assert cut_at_other_version(records, (range(1, 3),)) == ([], (), "aurora.trace/4")


def test_fields_that_a_newer_release_adds_to_events_and_status_are_ignored() -> None:
    status = PartitionStatus(partition=0, next_offset=1, end_offset=2, lag=1, stalled_s=0)
    assert PartitionStatus.model_validate({**status.model_dump(), "newer": 1}) == status
    lag = TrainerLag(time=datetime(2026, 5, 17, tzinfo=UTC), line="line", lag_s=1, share=0.5, valid_s=9)
    assert TrainerLag.model_validate({**lag.model_dump(), "newer": [1]}) == lag
