"""Finds a record that ends every worker: counts in the store at which offset workers have ended.

A worker that dies leaves no word, so each one writes down the next offset of a partition before it writes there for the
first time. If that is where an earlier worker ended, records are written one by one for a while, and each is written
down before. The record at which ``MAX_CRASHES`` workers have ended becomes a dead letter unread.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from pyarrow.fs import FileType

from pipeline.delta import DeltaLog, TableError
from pipeline.offsets import SourcePartition

MAX_CRASHES = 3
_TABLE, _FOLDER = "dead_letters", "_attempts"
"""The files are in a table's folder. Delta ignores names that begin with an underscore."""


@dataclass(slots=True)
class _Attempt:
    offset: int
    crashes: int


class CrashCounter:
    """Counts crashes by partition. A partition is trusted, and no longer counted, once records were written to it.

    Args:
        tables: The store.
        careful_records: Records that are written one by one after a crash.
    """

    def __init__(self, tables: DeltaLog, careful_records: int) -> None:
        self._tables = tables
        self._careful_records = careful_records
        self._attempts: dict[SourcePartition, _Attempt] = {}
        self._careful: dict[SourcePartition, int] = {}
        """Records that are still to be written one by one."""
        self._trusted: set[SourcePartition] = set()

    def begin(self, source: SourcePartition, next_offset: int) -> int:
        """Write down an attempt to pass the next offset. Return how many workers have ended at it before.

        Raises:
            TableError: the store failed.
        """
        if source in self._trusted:
            return 0
        attempt = self._attempts.get(source)
        if attempt is None or attempt.offset != next_offset:
            attempt = self._read(source)
            attempt = _Attempt(next_offset, attempt.crashes if attempt and attempt.offset == next_offset else 0)
            self._store(source, next_offset, attempt.crashes + 1)
            self._attempts[source] = attempt
            if attempt.crashes:
                self._careful[source] = self._careful_records
        return attempt.crashes

    def is_careful(self, source: SourcePartition) -> bool:
        """Return whether the records of a partition are written one by one."""
        return source in self._careful

    def pass_(self, sources: Iterable[SourcePartition]) -> None:
        """Count a successful write."""
        for source in sources:
            left = self._careful.pop(source, 0) - 1
            if left > 0:
                self._careful[source] = left
            else:
                self._trusted.add(source)

    def fail(self, sources: Iterable[SourcePartition]) -> None:
        """Take back the attempts of a failed write, because the worker lives on."""
        for source in sources:
            if source not in self._trusted and (attempt := self._attempts.pop(source, None)):
                with suppress(TableError):  # the store fails anyway: the attempt counts as a crash at most once
                    self._store(source, attempt.offset, attempt.crashes)

    def _read(self, source: SourcePartition) -> _Attempt | None:
        with self._tables.translate_errors(_TABLE):
            store, path = self._tables.filesystem(_TABLE), _path(source)
            if store.get_file_info(path).type == FileType.NotFound:
                return None
            with store.open_input_stream(path) as file:
                return _Attempt(**json.loads(file.read()))

    def _store(self, source: SourcePartition, offset: int, crashes: int) -> None:
        with (
            self._tables.translate_errors(_TABLE),
            # Unbuffered, Arrow passes a kind of bytes that the library rejects.
            self._tables.filesystem(_TABLE).open_output_stream(_path(source), buffer_size=64) as file,
        ):
            file.write(json.dumps({"offset": offset, "crashes": crashes}).encode())


def _path(source: SourcePartition) -> str:
    return f"{_FOLDER}/{source.topic}-{source.partition}.json"
