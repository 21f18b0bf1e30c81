"""The Delta tables: how the stream writes them, and how the trainer, the promoter and people read them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import (
    ColumnProperties,
    CommitProperties,
    DeltaTable,
    QueryBuilder,
    Transaction,
    WriterProperties,
    write_deltalake,
)
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler
from pyarrow.fs import FileSystem, PyFileSystem

from pipeline.offsets import ConflictError, Source, transaction_id
from schemas.batches import CURSORS, PARTITIONED_BY, TABLES, day_of
from schemas.errors import UserError
from schemas.settings import Tables

LOG_DAYS = 16
"""For how long the commits of a table are kept: longer than any reader's lease can be."""
PROPERTIES = {
    "delta.checkpointInterval": "100",
    "delta.logRetentionDuration": f"interval {LOG_DAYS} days",
    # Maintenance does it, off the way of the commits.
    "delta.enableExpiredLogCleanup": "false",
}
"""Of every table. Opening one reads its newest checkpoint and the commits that follow it."""
OLDEST = "oldest"
"""Application transaction with the version after which everything that was added can be read: maintenance moves it in
a commit before it deletes anything."""
REOPEN_AFTER = 50
"""Appends through one handle. Each leaves its file list in the handle, which slows the next: 14 ms at first and 80 ms
after 1,000 on two cores, where opening costs 12 ms."""
STORE_OPTIONS = {"connect_timeout": "5s", "timeout": "20s", "max_retries": "3", "retry_timeout": "40s"}
"""For an object store, where ``tables.storage_options`` says nothing else: a request that gets no answer fails within a
minute, which the stream sees and tries again; by itself the library would try for three."""
ZSTD_LEVEL = 3
RAW_COLUMNS = ("features", "value")
"""Columns of long bytes: no two are the same, and nobody looks for one by its value."""
WRITTEN_AS = WriterProperties(
    compression="ZSTD",
    compression_level=ZSTD_LEVEL,
    column_properties=dict.fromkeys(RAW_COLUMNS, ColumnProperties(dictionary_enabled=False, statistics_enabled="NONE")),
)
"""How the files of every table are encoded; ``docs/benchmarks/results.md`` says against what it was measured."""
_SQL = {"datafusion.catalog.information_schema": "true"}
"""For SHOW TABLES."""

Moment = int | datetime
"""A state of a table: its version, or the one that was newest at that time (UTC where it names no zone)."""


class TableError(UserError):
    """The tables cannot be read or written; the message says which one, where, and why."""


@contextmanager
def failures_of(what: str) -> Iterator[None]:
    """Turn what the store and the Delta library raise into ``TableError``."""
    try:
        yield
    # The library's readers pass on what the store raised as an error of Arrow.
    except (DeltaError, OSError, pa.ArrowException) as error:
        raise TableError(f"{what}: {_in_one_line(error)}; check tables.uri and tables.storage_options") from error


def _in_one_line(error: Exception) -> str:
    """What the library draws as a coloured tree."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|↳", " ", str(error)).split())


class GoneError(TableError):
    """Rows that a reader asks for can no longer be read version by version."""


class TableSnapshot:
    """One state of a table, held by an open handle: an append follows that state directly, or fails."""

    def __init__(self, table: DeltaTable) -> None:
        self._table = table
        self._appends = 0

    @property
    def worn(self) -> bool:
        """Whether to open the table anew: after many appends, and after any failed one."""
        return self._appends >= REOPEN_AFTER

    @property
    def version(self) -> int:
        """Of this state."""
        return self._table.version()

    def refresh(self) -> None:
        """Read the commits that others have made."""
        self._table.update_incremental()

    def transaction(self, app_id: str) -> int | None:
        """Version of an application transaction in this state.

        Raises:
            TableError: the log of the table, of which the handle holds a part only, cannot be read.
        """
        with failures_of(f"log of {self._table.table_uri}"):
            return self._table.transaction_version(app_id)

    def append(self, rows: pa.Table, transactions: Mapping[str, int]) -> None:
        """Add rows and set transaction versions, in one commit that directly follows this state.

        Raises:
            ConflictError: the table has left this state; nothing was added.
            TableError: the store failed, and may or may not have kept the commit.
        """
        appends, self._appends = self._appends, REOPEN_AFTER
        # Without retries: a retry would move the commit onto a state that nobody has checked.
        commit = CommitProperties(
            app_transactions=[Transaction(app_id, version) for app_id, version in transactions.items()],
            max_commit_retries=0,
        )
        with failures_of(f"append to {self._table.table_uri}"):
            try:
                write_deltalake(
                    self._table, rows, mode="append", commit_properties=commit, writer_properties=WRITTEN_AS
                )
            except CommitFailedError as error:
                raise ConflictError(str(error)) from error
        self._appends = appends + 1


class DeltaLog:
    """The tables of ``schemas.batches.TABLES`` below one address. Tables that do not exist yet are created empty.

    Every method raises ``TableError`` when the store refuses or fails. Not thread-safe.
    """

    def __init__(self, settings: Tables) -> None:
        self._uri = settings.uri
        in_store = "://" in settings.uri and not settings.uri.startswith("file:")
        self._options = {**(STORE_OPTIONS if in_store else {}), **settings.storage_options}
        self._snapshots: dict[str, TableSnapshot] = {}

    def create(self) -> None:
        """Make sure that every table exists."""
        for name in TABLES:
            self.open(name)

    def version(self, name: str) -> int:
        """Newest version of a table; 0 is the empty table."""
        return self.open(name).version()

    def read_added(
        self, name: str, after_version: int, up_to_version: int, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows that the commits ``after_version + 1 .. up_to_version`` appended, in the order of the commits.

        Reads only the files that those commits added. ``after_version=0`` reads from the beginning.

        Raises:
            GoneError: maintenance has deleted some of those files; go on from ``oldest``, or take ``read``.
        """
        schema = TABLES[name] if columns is None else pa.schema([TABLES[name].field(c) for c in columns])
        if after_version >= up_to_version:
            return schema.empty_table()
        table = self.open(name)
        self._check_kept(name, table, after_version)
        with self.failures(name):
            changes = pa.RecordBatchReader.from_stream(
                table.load_cdf(
                    starting_version=after_version + 1,
                    ending_version=up_to_version,
                    # Quoted: the library reads them as SQL, where "offset" is a keyword.
                    columns=[f'"{column}"' for column in [*schema.names, "_commit_version"]],
                )
            )
            commits = [part for batch in changes for part in _split_by_commit(batch)]
        commits.sort(key=lambda commit: commit[0])
        if not commits:
            return schema.empty_table()
        return pa.Table.from_batches([rows for _, rows in commits]).select(schema.names).cast(schema)

    def oldest(self, name: str) -> int:
        """The version after which everything that was added can still be read."""
        return _oldest(self.open(name))

    def version_at(self, name: str, moment: Moment) -> int:
        """The version that a moment names: the newest one at a time."""
        return self._open_at(name, moment).version()

    def check_kept(self, name: str, after_version: int) -> None:
        """Make sure that everything that was added after a version can still be read.

        Raises:
            GoneError: it cannot.
        """
        self._check_kept(name, self.open(name), after_version)

    def files(self, name: str) -> dict[str, int]:
        """Path and bytes of the files that the newest state of a table consists of, from its log alone."""
        table = self.open(name)
        with self.failures(name):
            files = pa.table(table.get_add_actions(flatten=True))
        return dict(zip(files["path"].to_pylist(), files["size_bytes"].to_pylist(), strict=True))

    def store(self, name: str) -> FileSystem:
        """The folder of a table."""
        return PyFileSystem(DeltaStorageHandler(self._address(name), self._options))

    def committed(self, name: str, version: int) -> datetime | None:
        """When a version was committed, by the store's clock; None where the log does not have it (any more)."""
        with self.failures(name):
            found: datetime | None = self.store(name).get_file_info(f"_delta_log/{version:020}.json").mtime
        return found

    def store_clock(self) -> datetime:
        """What time it is for the store: that of a file that was just written."""
        name, path = "cursors", "_clock"
        with self.failures(name):
            store = self.store(name)
            # Unbuffered, Arrow hands the library a kind of bytes that it does not take.
            with store.open_output_stream(path, buffer_size=64) as file:
                file.write(b"-")
            written: datetime = store.get_file_info(path).mtime
        return written

    def announce(self, reader: str, versions: Mapping[str, int]) -> None:
        """Say how far a reader has read some tables, so that what it has not read stays.

        Args:
            reader: A name that it keeps over restarts.
            versions: By table, the version after which it needs every row.
        """
        now = time.time_ns() // 1000
        rows = [
            {"time": now, "day": day_of(now), "reader": reader, "table": name, "version": version}
            for name, version in versions.items()
        ]
        self.append("cursors", pa.Table.from_pylist(rows, schema=CURSORS))

    def read(self, name: str, columns: Sequence[str] | None = None, at: Moment | None = None) -> pa.Table:
        """All rows of a table in its newest state or an earlier one, in no order."""
        schema = TABLES[name] if columns is None else pa.schema([TABLES[name].field(c) for c in columns])
        table = self.open(name) if at is None else self._open_at(name, at)
        with self.failures(name):
            rows = pa.RecordBatchReader.from_stream(table.scan(schema.names)).read_all()
        return rows.select(schema.names).cast(schema)

    def read_in_order(self, name: str) -> pa.Table:
        """All rows of a table in the order of their commits; for tables that keep their whole log."""
        return self.read_added(name, 0, self.version(name))

    def read_offsets(self, name: str, source: Source, offsets: range, columns: Sequence[str]) -> pa.Table:
        """Rows that a range of one partition's records gave, in the order of their offsets; reads few other files."""
        # Names of our own; the topic is what the settings say.
        rows = self.query(
            f"SELECT {_quoted(columns)} FROM {name} WHERE topic = '{escaped(source.topic)}' "  # noqa: S608
            f'AND partition = {source.partition} AND "offset" >= {offsets.start} AND "offset" < {offsets.stop} '
            f'ORDER BY "offset"'
        ).read_all()
        return rows.cast(pa.schema([TABLES[name].field(column) for column in columns]))

    def query(self, sql: str, at: Mapping[str, Moment] | None = None) -> pa.RecordBatchReader:
        """Answer SQL (DataFusion's) over the tables by their names, as a stream that is read once.

        Reading from the stream raises ``TableError`` too. Nothing can be written: the tables take no INSERT.

        Args:
            sql: One statement.
            at: Tables of which not the newest state is asked.
        """
        tables = QueryBuilder(_SQL)
        named = [name for name in TABLES if re.search(rf"\b{name}\b", sql)]
        for name in named or TABLES:
            moment = (at or {}).get(name)
            tables.register(name, self.open(name) if moment is None else self._open_at(name, moment))
        with _failures_of_query():
            answer = pa.RecordBatchReader.from_stream(tables.execute(sql))
        schema = pa.schema([field.with_type(_without_views(field.type)) for field in answer.schema])

        def batches() -> Iterator[pa.RecordBatch]:
            with _failures_of_query():
                yield from (batch.cast(schema) for batch in answer)

        return pa.RecordBatchReader.from_batches(schema, batches())

    def row_count(self, name: str) -> int:
        """Rows of a table, from its log alone."""
        return int(self.open(name).count())

    def size(self, name: str) -> int:
        """Bytes of the files that the newest state of a table consists of, from its log alone."""
        return sum(self.files(name).values())

    def append(self, name: str, rows: pa.Table) -> None:
        """Add rows outside the exactly-once protocol, for a table that has no source partitions."""
        table = self.open(name)
        with self.failures(name):
            write_deltalake(table, rows.cast(TABLES[name]), mode="append", writer_properties=WRITTEN_AS)

    def append_after(self, name: str, version: int, rows: pa.Table) -> bool:
        """Add rows directly after a state; False, and nothing is added, where the table has left it."""
        snapshot = self.snapshot(name)
        if snapshot.version != version:
            return False
        try:
            snapshot.append(rows.cast(TABLES[name]), {})
        except ConflictError:
            return False
        return True

    def snapshot(self, name: str) -> TableSnapshot:
        """The newest state of a table, to append to."""
        known = self._snapshots.get(name)
        if known is None or known.worn:
            known = self._snapshots[name] = TableSnapshot(self.open(name))
            return known
        with self.failures(name):
            known.refresh()
        return known

    def snapshot_version(self, name: str) -> int:
        """Version of the state that ``snapshot`` gave last: after an append, the version that it made."""
        return self._snapshots[name].version

    def reached(self, name: str, source: Source, version: int | None = None) -> int:
        """Offset of the last record of a partition that a state of a table contains, the newest by default; -1 without
        any."""
        table = self.open(name) if version is None else self._open_at(name, version)
        with self.failures(name):
            last = table.transaction_version(transaction_id(name, source))
        return -1 if last is None else last

    def open(self, name: str) -> DeltaTable:
        """A handle on the newest state of a table."""
        address = self._address(name)
        with self.failures(name):
            try:
                return DeltaTable(address, storage_options=self._options)
            except TableNotFoundError:
                return self._create(name, address)

    def _check_kept(self, name: str, table: DeltaTable, after_version: int) -> None:
        oldest = _oldest(table)
        if after_version < oldest:
            raise GoneError(
                f"table {name} at {self._address(name)}: what was added after version {after_version} can be read only "
                f"from version {oldest} on. Go on from there, or read the state of the table as a whole; for a reader "
                f"that comes back so late raise tables.reader_lease, for one that announces nothing "
                f"tables.vacuum_retention"
            )

    def _open_at(self, name: str, moment: Moment) -> DeltaTable:
        table = self.open(name)
        with self.failures(f"{name}, state {moment},"):
            table.load_as_version(moment)
        return table

    def _create(self, name: str, address: str) -> DeltaTable:
        try:
            return DeltaTable.create(
                address,
                TABLES[name],
                partition_by=list(PARTITIONED_BY[name]),
                storage_options=self._options,
                configuration=PROPERTIES,
            )
        except DeltaError:
            # Another process may have created it in the meantime; if not, opening says what is wrong.
            return DeltaTable(address, storage_options=self._options)

    def _address(self, name: str) -> str:
        return f"{self._uri.rstrip('/')}/{name}" if "://" in self._uri else str(Path(self._uri).resolve() / name)

    @contextmanager
    def failures(self, name: str) -> Iterator[None]:
        """Turn what handling a table raises into ``TableError``."""
        with failures_of(f"table {name} at {self._address(name)}"):
            yield


def _oldest(table: DeltaTable) -> int:
    return table.transaction_version(OLDEST) or 0


@contextmanager
def _failures_of_query() -> Iterator[None]:
    try:
        yield
    except (DeltaError, OSError, pa.ArrowException) as error:
        raise TableError(f"query: {_in_one_line(error)}") from error


def _quoted(columns: Sequence[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)


def escaped(text: str) -> str:
    """Text as it stands between the quotes of a string in SQL."""
    return text.replace("'", "''")


def _without_views(kind: pa.DataType) -> pa.DataType:
    """The type that other tools know: the query engine answers with views into its buffers."""
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_list(kind):
        return pa.list_(_without_views(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_views(field.type)) for field in kind])
    return kind


def _split_by_commit(batch: pa.RecordBatch) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Commit version and rows, without copying: sorting would join the features into one array of at most 2 GiB."""
    versions = batch.column("_commit_version").to_numpy()
    cuts = [0, *(np.flatnonzero(np.diff(versions)) + 1), len(versions)]
    for start, end in pairwise(cuts):
        if start < end:
            yield int(versions[start]), batch.slice(start, end - start)
