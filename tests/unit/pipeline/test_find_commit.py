"""Which version of a table a record is in, also where old states are gone."""

from __future__ import annotations

import pytest

from pipeline.delta import TableError
from pipeline.offsets import SourcePartition
from pipeline.trace_queries import find_commit

SOURCE = SourcePartition("traces", 0)
ENDS = [-1, 3, 3, 7, 8, 8, 20]
"""Last offset by version; merging files and other partitions' commits leave it as it is."""


class Tables:
    def __init__(self, oldest: int = 0) -> None:
        self.oldest = oldest

    def version(self, name: str) -> int:
        return len(ENDS) - 1

    def last_offset(self, name: str, source: SourcePartition, version: int | None = None) -> int:
        if version is not None and version < self.oldest:
            raise TableError("gone")
        return ENDS[-1 if version is None else version]


@pytest.mark.parametrize("offset", range(25))
@pytest.mark.parametrize("oldest", range(len(ENDS)))
def test_it_is_the_first_version_that_holds_the_record_and_can_be_opened(offset: int, oldest: int) -> None:
    holding = [version for version, end in enumerate(ENDS) if end >= offset and version >= oldest]
    assert find_commit(Tables(oldest), "accepted", SOURCE, offset) == (holding[0] if holding else None)
