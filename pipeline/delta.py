"""The Delta tables: how the stream writes them, and how the trainer, the promoter and the CLI read them."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from deltalake import (
    ColumnProperties,
    CommitProperties,
    DeltaTable,
    PostCommitHookProperties,
    QueryBuilder,
    Transaction,
    WriterProperties,
    write_deltalake,
)
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.fs import DeltaStorageHandler
from deltalake.schema import Schema
from pyarrow.fs import FileSystem, FileType, PyFileSystem

from pipeline.offsets import ConflictError, FencedError, SourcePartition, transaction_id
from schemas.batches import CURSORS, PARTITIONED_BY, TABLES, day_of
from schemas.errors import UserError
from schemas.settings import Tables

LOG_DAYS = 16
"""Days for which the commits of a table are kept: more than any reader's lease."""
CHECKPOINT_COMMITS = 100
"""Opening a table reads its newest checkpoint and the commits that follow it. Maintenance writes a checkpoint after so
many commits."""
TABLE_PROPERTIES = {
    "delta.checkpointInterval": str(CHECKPOINT_COMMITS),
    "delta.logRetentionDuration": f"interval {LOG_DAYS} days",
    # Maintenance cleans the log, off the path of the commits.
    "delta.enableExpiredLogCleanup": "false",
}
"""Properties of every table."""
OLDEST = "oldest"
"""Application transaction whose version is the one after which all added rows can be read. Maintenance raises it in a
commit before it deletes any file."""
REOPEN_AFTER = 400
"""Appends through one handle. Each one lists the commits since the checkpoint that the handle was opened with, and
keeps their files: a request lists 1,000 commits."""
COMMIT_RETRIES = 100
"""Commits of others that may take the next version while a commit is made. A retry writes a new log entry only."""
MAX_FOLLOWED = 200
"""Commits of others that a handle reads one by one to follow its application transactions."""
_FENCED = "Concurrent transaction failed"
"""Message of the library's error for a commit with an application transaction that a commit since has set."""
STORE_OPTIONS = {"connect_timeout": "5s", "timeout": "20s", "max_retries": "3", "retry_timeout": "40s"}
"""Defaults for an object store; ``tables.storage_options`` overrides them. A request without an answer fails within a
minute, and the stream retries it. The library's own default is three minutes."""
ZSTD_LEVEL = 3
SCHEMA_MODE: Literal["merge"] = "merge"
"""Rows get null in columns that a newer release added to the table."""
RAW_COLUMNS = ("features", "value")
"""Columns of long byte strings: all values differ, and no query filters by them."""
WRITER_PROPERTIES = WriterProperties(
    compression="ZSTD",
    compression_level=ZSTD_LEVEL,
    column_properties=dict.fromkeys(RAW_COLUMNS, ColumnProperties(dictionary_enabled=False, statistics_enabled="NONE")),
)
"""Encoding of the files of every table. ``docs/benchmarks/results.md`` has the measurements."""
_NO_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
"""Maintenance writes checkpoints and cleans the log. A checkpoint reads every commit since the last one, twice."""
_SQL_OPTIONS = {
    "datafusion.catalog.information_schema": "true",
    "datafusion.sql_parser.enable_ident_normalization": "true",
}
"""For SHOW TABLES, and for names in any case."""

Moment = int | datetime
"""A version of a table: its number, or the time at which it was the newest one (UTC if the time has no zone)."""


class TableError(UserError):
    """The tables cannot be read or written. The message names the table, its address and the reason."""


class HistoryExpiredError(TableError):
    """The requested rows can no longer be read version by version."""


@contextmanager
def translate_errors(subject: str) -> Iterator[None]:
    """Raise errors of the store and the Delta library as ``TableError``."""
    try:
        yield
    # The library's readers raise errors of the store as Arrow errors.
    except (DeltaError, OSError, pa.ArrowException) as error:
        raise TableError(f"{subject}: {_flatten(error)}; check tables.uri and tables.storage_options") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the library's Rust code: it is no Exception, and not exported
            raise
        raise TableError(f"{subject}: {_flatten(error)}; check tables.uri") from error


def store_options(settings: Tables) -> dict[str, str]:
    """Return the options with which the library opens tables."""
    return {**(STORE_OPTIONS if "://" in settings.uri else {}), **settings.storage_options}


def _flatten(error: BaseException) -> str:
    """Return the message in one line. The library writes it as a coloured tree."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|↳", " ", str(error)).split())


class TableSnapshot:
    """An open handle on a table, which knows the application transactions of its version.

    It moves when it appends and when it is refreshed. It follows the transactions that were asked for through the
    commits of others between, so that each of them is searched in the log only once.
    """

    def __init__(self, open_newest: Callable[[], DeltaTable], store: Callable[[], FileSystem]) -> None:
        """Open the newest version.

        Args:
            open_newest: Opens the table.
            store: Returns the file system with the table's folder as its root.
        """
        self._open_newest = open_newest
        self._open_store = store
        self._store: FileSystem | None = None
        self._transactions: dict[str, int | None] = {}
        self._appends = 0
        self._lock = threading.Lock()
        self.table = open_newest()

    @property
    def version(self) -> int:
        """Version of this snapshot."""
        return self.table.version()

    def refresh(self) -> None:
        """Move to the newest version of the table.

        Raises:
            TableError: the store failed.
        """
        with self._lock:
            before = self.version
            if self._appends >= REOPEN_AFTER:
                self.table, self._appends = self._open_newest(), 0
            else:
                appends, self._appends = self._appends, REOPEN_AFTER
                with translate_errors(f"log of {self.table.table_uri}"):
                    self.table.update_incremental()
                self._appends = appends
            if self.version < before:
                self._transactions.clear()  # the table was created anew
            self._follow(range(before + 1, self.version + 1))

    def transaction(self, app_id: str) -> int | None:
        """Return the version of an application transaction in this snapshot.

        Raises:
            TableError: the log of the table cannot be read; the handle holds only a part of it.
        """
        if app_id not in self._transactions:
            with translate_errors(f"log of {self.table.table_uri}"):
                self._transactions[app_id] = self.table.transaction_version(app_id)
        return self._transactions[app_id]

    def append(self, rows: pa.Table, transactions: Mapping[str, int], retries: int = COMMIT_RETRIES) -> None:
        """Add rows and set transaction versions in one commit, and move the snapshot behind it.

        The files are written once. Commits of others since this snapshot only delay the commit, up to ``retries`` of
        them. With no retries the commit directly follows this snapshot.

        Raises:
            FencedError: a commit since this snapshot has set one of the transactions, or this commit was made and its
                answer lost.
            ConflictError: nothing was added: the table's columns have changed, or others took every next version.
            TableError: the store failed. The commit may or may not have been made.
        """
        before = self.version
        # After an error the handle is opened anew.
        appends, self._appends = self._appends, REOPEN_AFTER
        commit = CommitProperties(
            app_transactions=[Transaction(app_id, version) for app_id, version in transactions.items()],
            max_commit_retries=retries,
        )
        with translate_errors(f"append to {self.table.table_uri}"):
            try:
                write_deltalake(
                    self.table,
                    rows,
                    mode="append",
                    schema_mode=SCHEMA_MODE,
                    commit_properties=commit,
                    post_commithook_properties=_NO_HOOKS,
                    writer_properties=WRITER_PROPERTIES,
                )
            except CommitFailedError as error:
                if _FENCED in str(error):
                    raise FencedError(
                        f"append to {self.table.table_uri}: another worker has set one of {sorted(transactions)} since "
                        f"version {before}"
                    ) from error
                raise ConflictError(f"append to {self.table.table_uri}: {_flatten(error)}") from error
        self._appends = appends + 1
        self._follow(range(before + 1, self.version))
        self._transactions |= transactions
        if self._appends >= REOPEN_AFTER:
            with suppress(TableError):  # the commit was made; the next refresh opens the table
                self.refresh()

    def _follow(self, versions: range) -> None:
        """Read the transactions that commits of others have set."""
        if not self._transactions or not versions:
            return
        if len(versions) > MAX_FOLLOWED:
            self._transactions.clear()
            return
        try:
            with translate_errors(f"log of {self.table.table_uri}"):
                self._store = self._store or self._open_store()
                for version in versions:
                    newer = _read_transactions(self._store, version)
                    self._transactions |= {key: newer[key] for key in newer.keys() & self._transactions.keys()}
        except TableError:
            self._transactions.clear()  # each is searched in the log again


def tables_in(sql: str) -> list[str]:
    """Return the tables that a query names, in any case."""
    return [name for name in TABLES if re.search(rf"\b{name}\b", sql, re.IGNORECASE)]


class DeltaLog:
    """The tables of ``schemas.batches.TABLES`` below one address.

    The handle of a table is kept, and reads only the commits since its last use. A table that does not exist is created
    empty. Nullable columns that a table of an older release lacks are added; its rows have null there. Nullable columns
    that a newer release has added are left alone; new rows have null there. Any other difference is an error.

    Every method raises ``TableError`` if the store fails. Not thread-safe.
    """

    def __init__(self, settings: Tables) -> None:
        self._uri = settings.uri
        self._options = store_options(settings)
        self._snapshots: dict[str, TableSnapshot] = {}

    def create(self) -> None:
        """Create every table that does not exist."""
        for name in TABLES:
            self.open(name)

    def open(self, name: str) -> DeltaTable:
        """Return a new handle on the newest version of a table."""
        address = self._address(name)
        with self.translate_errors(name):
            try:
                table = DeltaTable(address, storage_options=self._options)
            except TableNotFoundError:
                return self._create(name, address)
            _check_schema(name, table)
            missing = _missing_columns(TABLES[name], table)
            return self._add_columns(table, missing) if missing else table

    # Writing

    def snapshot(self, name: str) -> TableSnapshot:
        """Return the kept handle of a table, at its newest version."""
        kept = self._snapshots.get(name)
        if kept is None:
            kept = self._snapshots[name] = TableSnapshot(lambda: self.open(name), lambda: self.filesystem(name))
        else:
            with self.translate_errors(name):
                kept.refresh()
        return kept

    def snapshot_version(self, name: str) -> int:
        """Return the version of the kept handle of a table; after an append, the version that the append made."""
        return self._snapshots[name].version

    def append(self, name: str, rows: pa.Table) -> None:
        """Add rows to a table without source partitions, outside the exactly-once protocol."""
        snapshot = self.snapshot(name)
        with self.translate_errors(name):
            rows = rows.cast(TABLES[name])
            try:
                snapshot.append(rows, {})
            except ConflictError as error:
                raise TableError(str(error)) from error

    def append_after(self, name: str, version: int, rows: pa.Table) -> bool:
        """Add rows directly after ``version``. Return False, and add nothing, if the table has a newer version."""
        snapshot = self.snapshot(name)
        if snapshot.version != version:
            return False
        try:
            snapshot.append(rows.cast(TABLES[name]), {}, retries=0)
        except ConflictError:
            return False
        return True

    def save_cursor(self, reader: str, versions: Mapping[str, int]) -> None:
        """Record how far a reader has read, so that maintenance keeps the rows that it has not read.

        Args:
            reader: Name of the reader; the same after a restart.
            versions: By table, the version after which the reader needs every row.
        """
        now = time.time_ns() // 1000
        rows = [
            {"time": now, "day": day_of(now), "reader": reader, "table": name, "version": version}
            for name, version in versions.items()
        ]
        self.append("cursors", pa.Table.from_pylist(rows, schema=CURSORS))

    # Reading

    def version(self, name: str) -> int:
        """Return the newest version of a table; 0 is the empty table."""
        return self.snapshot(name).version

    def version_at(self, name: str, moment: Moment) -> int:
        """Return the version of a table at a moment."""
        return self._open_at(name, moment).version()

    def read(self, name: str, columns: Sequence[str] | None = None, at: Moment | None = None) -> pa.Table:
        """Return all rows of the newest or an earlier version of a table, in no order."""
        schema = _schema(name, columns)
        table = self.snapshot(name).table if at is None else self._open_at(name, at)
        missing = _missing_columns(schema, table)
        with self.translate_errors(name):
            present = [column for column in schema.names if column not in missing.names]
            rows = pa.RecordBatchReader.from_stream(table.scan(present)).read_all()
        for field in missing:
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
        return rows.select(schema.names).cast(schema)

    def read_added(
        self,
        name: str,
        after_version: int,
        up_to_version: int,
        columns: Sequence[str] | None = None,
        line: str | None = None,
    ) -> pa.Table:
        """Return the rows that the commits ``after_version + 1 .. up_to_version`` added, in the order of the commits.

        Only the files that those commits added are read; with a ``line`` only its files. ``after_version=0`` reads from
        the beginning.

        Raises:
            HistoryExpiredError: maintenance has deleted some of those files. Continue from ``oldest_readable``, or use
                ``read``.
        """
        schema = _schema(name, columns)
        if after_version >= up_to_version:
            return schema.empty_table()
        snapshot = self.snapshot(name)
        self._check_readable(name, snapshot, after_version)
        with self.translate_errors(name):
            where = None if line is None else f"line = '{escape_sql(line)}'"
            commits = _read_changes(snapshot.table, range(after_version + 1, up_to_version + 1), schema.names, where)
        commits.sort(key=lambda commit: commit[0])
        if not commits:
            return schema.empty_table()
        return pa.Table.from_batches([rows for _, rows in commits]).select(schema.names).cast(schema)

    def read_in_order(self, name: str) -> pa.Table:
        """Return all rows of a table in the order of their commits, for a table that keeps its whole log."""
        return self.read_added(name, 0, self.version(name))

    def read_offsets(self, name: str, source: SourcePartition, offsets: range, columns: Sequence[str]) -> pa.Table:
        """Return the rows of a range of one partition's records, ordered by offset. Few other files are read."""
        # Table and columns are names from the code; the topic comes from the settings.
        rows = self.query(
            f"SELECT {_quote_columns(columns)} FROM {name} WHERE topic = '{escape_sql(source.topic)}' "  # noqa: S608
            f'AND partition = {source.partition} AND "offset" >= {offsets.start} AND "offset" < {offsets.stop} '
            f'ORDER BY "offset"'
        ).read_all()
        return rows.cast(_schema(name, columns))

    def query(self, sql: str, at: Mapping[str, Moment] | None = None) -> pa.RecordBatchReader:
        """Run a SQL query (DataFusion dialect) over the tables. Return its result as a stream that is read once.

        Reading from the stream raises ``TableError`` too. The tables are read-only: INSERT fails.

        Args:
            sql: One statement.
            at: Tables of which an earlier version is queried.
        """
        engine = QueryBuilder(_SQL_OPTIONS)
        for name in tables_in(sql) or TABLES:
            moment = (at or {}).get(name)
            engine.register(name, self.snapshot(name).table if moment is None else self._open_at(name, moment))
        with _translate_query_errors():
            result = pa.RecordBatchReader.from_stream(engine.execute(sql))
        schema = pa.schema([field.with_type(_without_views(field.type)) for field in result.schema])

        def batches() -> Iterator[pa.RecordBatch]:
            with _translate_query_errors():
                yield from (batch.cast(schema) for batch in result)

        return pa.RecordBatchReader.from_batches(schema, batches())

    def oldest_readable(self, name: str) -> int:
        """Return the version after which all added rows can still be read."""
        return self.snapshot(name).transaction(OLDEST) or 0

    def check_readable(self, name: str, after_version: int) -> None:
        """Check that all rows added after a version can still be read.

        Raises:
            HistoryExpiredError: they cannot.
        """
        self._check_readable(name, self.snapshot(name), after_version)

    def last_offset(self, name: str, source: SourcePartition, version: int | None = None) -> int:
        """Return the last offset of a partition in the newest or an earlier version of a table; -1 without records."""
        app_id = transaction_id(name, source)
        if version is None:
            last = self.snapshot(name).transaction(app_id)
        else:
            table = self._open_at(name, version)
            with self.translate_errors(name):
                last = table.transaction_version(app_id)
        return -1 if last is None else last

    # The following methods read the log of a table alone.

    def row_count(self, name: str) -> int:
        """Return the number of rows of a table."""
        return int(self.snapshot(name).table.count())

    def size(self, name: str) -> int:
        """Return the bytes of the files of the newest version of a table."""
        return sum(self.file_sizes(name).values())

    def file_sizes(self, name: str) -> dict[str, int]:
        """Return path and bytes of the files of the newest version of a table."""
        table = self.snapshot(name).table
        with self.translate_errors(name):
            files = pa.table(table.get_add_actions(flatten=True))
        return dict(zip(files["path"].to_pylist(), files["size_bytes"].to_pylist(), strict=True))

    # The store

    def filesystem(self, name: str) -> FileSystem:
        """Return a file system with the folder of a table as its root."""
        return PyFileSystem(DeltaStorageHandler(self._address(name), self._options))

    def checkpoint_version(self, name: str) -> int:
        """Return the version of a table's newest checkpoint; -1 without one."""
        with self.translate_errors(name):
            store, path = self.filesystem(name), "_delta_log/_last_checkpoint"
            if store.get_file_info(path).type == FileType.NotFound:
                return -1
            with store.open_input_stream(path) as file:
                return int(json.loads(file.read())["version"])

    def commit_time(self, name: str, version: int) -> datetime | None:
        """Return the time of a commit by the store's clock; None if the log does not contain the commit."""
        with self.translate_errors(name):
            found: datetime | None = self.filesystem(name).get_file_info(f"_delta_log/{version:020}.json").mtime
        return found

    def store_clock(self) -> datetime:
        """Return the store's time: the modification time of a file that is written for this purpose."""
        name, path = "cursors", "_clock"
        with self.translate_errors(name):
            store = self.filesystem(name)
            # Unbuffered, Arrow passes a kind of bytes that the library rejects.
            with store.open_output_stream(path, buffer_size=64) as file:
                file.write(b"-")
            written: datetime = store.get_file_info(path).mtime
        return written

    @contextmanager
    def translate_errors(self, name: str) -> Iterator[None]:
        """Raise errors about a table as ``TableError``."""
        with translate_errors(f"table {name} at {self._address(name)}"):
            yield

    def _check_readable(self, name: str, snapshot: TableSnapshot, after_version: int) -> None:
        oldest = snapshot.transaction(OLDEST) or 0
        if after_version < oldest:
            raise HistoryExpiredError(
                f"table {name} at {self._address(name)}: rows added after version {after_version} can be read only "
                f"from version {oldest} on. Continue from there, or read the table as a whole; raise "
                f"tables.reader_lease for a reader that saves a cursor, tables.vacuum_retention for one that does not"
            )

    def _open_at(self, name: str, moment: Moment) -> DeltaTable:
        table = self.open(name)
        with self.translate_errors(f"{name}, version {moment},"):
            table.load_as_version(moment)
        return table

    def _create(self, name: str, address: str) -> DeltaTable:
        try:
            return DeltaTable.create(
                address,
                TABLES[name],
                partition_by=list(PARTITIONED_BY[name]),
                storage_options=self._options,
                configuration=TABLE_PROPERTIES,
            )
        except DeltaError:
            # Another process may have created it meanwhile. If not, opening it raises the reason.
            return DeltaTable(address, storage_options=self._options)

    def _add_columns(self, table: DeltaTable, columns: pa.Schema) -> DeltaTable:
        try:
            table.alter.add_columns(Schema.from_arrow(columns).fields)
        except CommitFailedError:
            # Another process has changed the table meanwhile, most likely by adding the same columns.
            return DeltaTable(table.table_uri, storage_options=self._options)
        return table

    def _address(self, name: str) -> str:
        return table_address(self._uri, name)


def table_address(uri: str, name: str) -> str:
    """Return the address of a table below ``tables.uri``; that of a folder is absolute."""
    return f"{uri.rstrip('/')}/{name}" if "://" in uri else str(Path(uri).resolve() / name)


def escape_sql(text: str) -> str:
    """Return text with the quotes escaped, for a string in SQL."""
    return text.replace("'", "''")


def _schema(name: str, columns: Sequence[str] | None) -> pa.Schema:
    return TABLES[name] if columns is None else pa.schema([TABLES[name].field(column) for column in columns])


def find_conflicts(schema: pa.Schema, found: Schema) -> list[str]:
    """Return a line for every difference of a table's columns that is neither an added nor a missing nullable column.

    Args:
        schema: Columns of this release.
        found: Columns of the table.
    """
    ours = {field.name: field for field in Schema.from_arrow(schema).fields}
    theirs = {field.name: field for field in found.fields}
    conflicts = []
    for name, field in ours.items():
        other = theirs.get(name)
        if other is None:
            conflicts += [] if field.nullable else [f"- {name}: the table lacks it, and this release requires it"]
        elif other.type != field.type:
            conflicts.append(
                f"~ {name}: {_name_type(other.type)} in the table, {_name_type(field.type)} in this release"
            )
        elif field.nullable and not other.nullable:
            conflicts.append(f"~ {name}: not null in the table, nullable in this release")
    added = [field for name, field in theirs.items() if name not in ours and not field.nullable]
    return [*conflicts, *(f"+ {field.name}: not null in the table, unknown to this release" for field in added)]


def _name_type(kind: object) -> str:
    """Return the name of a type as the log of a table has it."""
    to_json: Callable[[], str] = kind.to_json  # type: ignore[attr-defined]  # of every type of the library
    return to_json().strip('"')


def _check_schema(name: str, table: DeltaTable) -> None:
    conflicts = find_conflicts(TABLES[name], table.schema())
    found = tuple(table.metadata().partition_columns)
    if found != tuple(PARTITIONED_BY[name]):
        conflicts.append(
            f"~ partitioned by {list(found)} in the table, by {list(PARTITIONED_BY[name])} in this release"
        )
    if conflicts:
        raise TableError(
            f"table {name} at {table.table_uri} has other columns than this release reads and writes: "
            f"{'; '.join(conflicts)}. Run the release that made it, or set tables.uri to new tables"
        )


def _missing_columns(schema: pa.Schema, table: DeltaTable) -> pa.Schema:
    present = {field.name for field in table.schema().fields}
    return pa.schema([field for field in schema if field.name not in present])


def _read_transactions(store: FileSystem, version: int) -> dict[str, int]:
    """Return the application transactions that a commit has set."""
    with store.open_input_stream(f"_delta_log/{version:020}.json") as file:
        actions = [json.loads(line) for line in file.read().splitlines() if b'"txn"' in line]
    return {action["txn"]["appId"]: action["txn"]["version"] for action in actions if "txn" in action}


@contextmanager
def _translate_query_errors() -> Iterator[None]:
    try:
        yield
    except (DeltaError, OSError, pa.ArrowException) as error:
        raise TableError(f"query: {_flatten(error)}") from error


def _quote_columns(columns: Sequence[str]) -> str:
    return ", ".join(f'"{column}"' for column in columns)


def _without_views(kind: pa.DataType) -> pa.DataType:
    """Return the type that other tools know. The query engine returns views of its buffers."""
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_list(kind):
        return pa.list_(_without_views(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_views(field.type)) for field in kind])
    return kind


def _read_changes(
    table: DeltaTable, versions: range, columns: Sequence[str], where: str | None
) -> list[tuple[int, pa.RecordBatch]]:
    """Return the rows that the commits of these versions added, by commit."""
    for first in versions:
        try:
            changes = pa.RecordBatchReader.from_stream(
                table.load_cdf(
                    starting_version=first,
                    ending_version=versions[-1],
                    # Quoted: the library parses them as SQL, where "offset" is a keyword.
                    columns=[f'"{column}"' for column in [*columns, "_commit_version"]],
                    predicate=where,
                )
            )
            return [part for batch in changes for part in _split_by_commit(batch)]
        except DeltaError as error:
            # The library does not start at a commit that adds columns. Such a commit adds no rows.
            if f"table version: {first} that does not have change data" not in str(error):
                raise
    return []


def _split_by_commit(batch: pa.RecordBatch) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield commit version and rows without a copy. A sort would join all features in one array of at most 2 GiB."""
    versions = batch.column("_commit_version").to_numpy()
    cuts = [0, *(np.flatnonzero(np.diff(versions)) + 1), len(versions)]
    for start, end in pairwise(cuts):
        if start < end:
            yield int(versions[start]), batch.slice(start, end - start)
