"""A small table whose rows have an order, and to which several processes add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from schemas.batches import TABLES


class Tables(Protocol):
    """The part of the Delta log that is used here. Every method raises ``TableError``."""

    def version(self, name: str) -> int:
        """Newest version of a table."""

    def read_added(self, name: str, after_version: int, up_to_version: int) -> pa.Table:
        """Rows that some commits added, in the order of the commits."""

    def append_after(self, name: str, version: int, rows: pa.Table) -> bool:
        """Add rows directly after a state; False where the table has left it."""


class Ledger:
    """Rows of one table, oldest first. A row is added only behind those that its writer has read.

    So of two processes that decide at the same time one is told to read again: the order of the rows is the order of
    the decisions, and each was made in the knowledge of all before it.
    """

    def __init__(self, tables: Tables, name: str) -> None:
        self._tables = tables
        self._name = name
        self._rows: list[dict[str, Any]] = []
        self._version = 0

    def read(self) -> Sequence[Mapping[str, Any]]:
        """All rows; only new ones are fetched.

        Raises:
            TableError: the table cannot be read.
        """
        newest = self._tables.version(self._name)
        if newest != self._version:
            self._rows += self._tables.read_added(self._name, self._version, newest).to_pylist()
            self._version = newest
        return self._rows

    def add(self, *rows: Mapping[str, Any]) -> bool:
        """Add rows behind those that were read last; False, and nothing is added, where others came in between.

        Raises:
            TableError: the table did not take them, or may have: ``read`` says.
        """
        added = pa.Table.from_pylist(list(rows), schema=TABLES[self._name])
        return self._tables.append_after(self._name, self._version, added)
