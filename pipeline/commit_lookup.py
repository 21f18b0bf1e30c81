"""Which version of a table a record is in."""

from __future__ import annotations

from typing import Protocol

from pipeline.delta import TableError
from pipeline.offsets import Source


class Tables(Protocol):
    """The part of the Delta log that is asked."""

    def version(self, name: str) -> int:
        """Newest version of a table."""

    def reached(self, name: str, source: Source, version: int | None = None) -> int:
        """Offset of the last record of a partition in a state of a table; -1 without any."""


def commit_of(tables: Tables, name: str, source: Source, offset: int) -> int | None:
    """The version of a table whose commit holds the rows of a record; None where the record is not in it yet.

    A commit before the log that is kept is told as the oldest version that can still be opened: in no case as one that
    is older than it is.

    Raises:
        TableError: the newest state cannot be read.
    """
    newest = tables.version(name)
    if tables.reached(name, source) < offset:
        return None
    low, high = 1, newest
    while low < high:
        middle = (low + high) // 2
        if _reached(tables, name, source, middle) >= offset:
            high = middle
        else:
            low = middle + 1
    return high


def _reached(tables: Tables, name: str, source: Source, version: int) -> int:
    """As the table says, and not at all in a state that cannot be opened any more."""
    try:
        return tables.reached(name, source, version)
    except TableError:
        return -1
