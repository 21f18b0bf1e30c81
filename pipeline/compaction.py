"""Compaction: merges small files of a table. No row is lost or duplicated, and none appears as newly added.

The library's own compaction lets two runs at the same time merge the same files, after which the rows are in the table
twice (seen with deltalake 1.6.6, with any application transactions). So this module only selects files and writes the
merged ones. ``pipeline.maintenance`` commits them with a transaction that the library does check: of two runs only the
first succeeds.
"""

from __future__ import annotations

import json
import posixpath
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.transaction import AddAction, RemoveAction
from pyarrow.fs import FileSystem

from pipeline.delta import RAW_COLUMNS, ZSTD_LEVEL

ROW_GROUP_BYTES = 32 << 20
"""Bytes of the rows that a merge holds in memory at a time."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of a table's newest version, as the table's log describes it."""

    path: str
    size: int
    partition: Mapping[str, str]
    rows: int
    min_values: Mapping[str, int | str]
    max_values: Mapping[str, int | str]

    def remove_action(self) -> RemoveAction:
        """Return the action that removes the file. It changes no data for readers that tail the table."""
        now_ms = time.time_ns() // 1_000_000
        return RemoveAction(self.path, False, now_ms, self.size, dict(self.partition))  # noqa: FBT003


def list_data_files(table: DeltaTable) -> list[DataFile]:
    """Return the files of a table, oldest first."""
    rows = pa.table(table.get_add_actions(flatten=True)).sort_by("modification_time").to_pylist()
    return [
        DataFile(
            path=row["path"],
            size=row["size_bytes"],
            partition={column: str(value) for column, value in _with_prefix("partition.", row)},
            rows=row["num_records"],
            min_values=_keep_json_types(_with_prefix("min.", row)),
            max_values=_keep_json_types(_with_prefix("max.", row)),
        )
        for row in rows
    ]


def group_small_files(files: Iterable[DataFile], target: int) -> list[list[DataFile]]:
    """Group files below ``target`` bytes, in order. A group is in one partition and has about ``target`` bytes."""
    by_partition: dict[tuple[str, ...], list[list[DataFile]]] = {}
    for file in files:
        if file.size < target:
            groups = by_partition.setdefault(tuple(file.partition.values()), [[]])
            if sum(other.size for other in groups[-1]) + file.size > target:
                groups.append([])
            groups[-1].append(file)
    return [group for groups in by_partition.values() for group in groups if len(group) > 1]


def write_merged_file(group: Sequence[DataFile], store: FileSystem) -> AddAction:
    """Write the rows of some files of one partition to a new file, which is in no version of the table yet.

    Args:
        group: The files.
        store: File system with the folder of the table as its root.
    """
    path = posixpath.join(posixpath.dirname(group[0].path), f"merged-{uuid.uuid4()}.zstd.parquet")
    schema, leaves = _read_schema(group, store)
    plain = [leaf for leaf in leaves if leaf not in RAW_COLUMNS]
    with (
        store.open_output_stream(path) as out,
        pq.ParquetWriter(
            out,
            schema,
            compression="zstd",
            compression_level=ZSTD_LEVEL,
            use_dictionary=plain,
            write_statistics=plain,
        ) as writer,
    ):
        for rows in _read_row_groups(group, schema, store):
            writer.write_table(rows, row_group_size=max(1, rows.num_rows))
    return AddAction(
        path=path,
        size=store.get_file_info(path).size,
        partition_values=dict(group[0].partition),
        modification_time=time.time_ns() // 1_000_000,
        data_change=False,
        stats=json.dumps(_merge_stats(group)),
    )


def _read_schema(group: Iterable[DataFile], store: FileSystem) -> tuple[pa.Schema, list[str]]:
    """Return the columns of all files, and the paths of their leaves. Files of older releases have fewer columns."""
    schemas = []
    for file in group:
        with store.open_input_file(file.path) as opened:
            schemas.append(pq.ParquetFile(opened).schema)
    leaves = dict.fromkeys(schema.column(i).path for schema in schemas for i in range(len(schema.names)))
    return pa.unify_schemas([schema.to_arrow_schema() for schema in schemas]), list(leaves)


def _read_row_groups(group: Iterable[DataFile], schema: pa.Schema, store: FileSystem) -> Iterator[pa.Table]:
    batches: list[pa.RecordBatch] = []
    for file in group:
        with store.open_input_file(file.path) as opened:
            parquet = pq.ParquetFile(opened)
            row_bytes = sum(
                parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)
            ) // max(1, parquet.metadata.num_rows)
            for batch in parquet.iter_batches(max(1, ROW_GROUP_BYTES // max(1, row_bytes))):
                batches.append(_add_nulls(batch, schema))
                if sum(rows.nbytes for rows in batches) >= ROW_GROUP_BYTES:
                    yield pa.Table.from_batches(batches)
                    batches = []
    if batches:
        yield pa.Table.from_batches(batches)


def _add_nulls(rows: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns = [
        rows.column(field.name) if field.name in rows.schema.names else pa.nulls(rows.num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _merge_stats(group: Sequence[DataFile]) -> dict[str, Any]:
    """Return the statistics by which queries skip the new file: the bounds that all of the old files have."""
    with_min = set.intersection(*(set(file.min_values) for file in group))
    with_max = set.intersection(*(set(file.max_values) for file in group))
    return {
        "numRecords": sum(file.rows for file in group),
        "minValues": {name: min(file.min_values[name] for file in group) for name in with_min},
        "maxValues": {name: max(file.max_values[name] for file in group) for name in with_max},
        "nullCount": {},
    }


def _with_prefix(prefix: str, row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name.removeprefix(prefix), value) for name, value in row.items() if name.startswith(prefix))


def _keep_json_types(bounds: Iterable[tuple[str, Any]]) -> dict[str, int | str]:
    """Keep the bounds that JSON represents exactly."""
    return {name: value for name, value in bounds if type(value) in {int, str}}
