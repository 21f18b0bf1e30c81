"""Merging the small files of a table: which ones, and how, without a row lost, doubled or seen as new.

The library's own compaction lets two that run at once merge the same files, after which their rows are in the table
twice (seen with deltalake 1.6.6, whichever application transactions it is given). Here the merged files are committed
with a transaction that the library does check, so that of two only the first succeeds.
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
"""Of rows in memory; what a merge holds at a time."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of a table's newest state, as its log describes it."""

    path: str
    size: int
    partition: Mapping[str, str]
    rows: int
    least: Mapping[str, int | str]
    most: Mapping[str, int | str]

    def removed(self) -> RemoveAction:
        """What takes it out of the table; no change of data for those who tail it."""
        now_ms = time.time_ns() // 1_000_000
        return RemoveAction(self.path, False, now_ms, self.size, dict(self.partition))  # noqa: FBT003


def files_of(table: DeltaTable) -> list[DataFile]:
    """The files of a table's state, oldest first."""
    rows = pa.table(table.get_add_actions(flatten=True)).sort_by("modification_time").to_pylist()
    return [
        DataFile(
            path=row["path"],
            size=row["size_bytes"],
            partition={column: str(value) for column, value in _below("partition.", row)},
            rows=row["num_records"],
            least=_comparable(_below("min.", row)),
            most=_comparable(_below("max.", row)),
        )
        for row in rows
    ]


def groups(files: Iterable[DataFile], target: int) -> list[list[DataFile]]:
    """Files of fewer than ``target`` bytes that become one, in their order: of one partition, and about that large."""
    together: dict[tuple[str, ...], list[list[DataFile]]] = {}
    for file in files:
        if file.size < target:
            found = together.setdefault(tuple(file.partition.values()), [[]])
            if sum(other.size for other in found[-1]) + file.size > target:
                found.append([])
            found[-1].append(file)
    return [group for found in together.values() for group in found if len(group) > 1]


def merged(group: Sequence[DataFile], store: FileSystem) -> AddAction:
    """Write the rows of some files of one partition into a new one, which is in no state of the table yet.

    Args:
        group: The files.
        store: With the folder of the table as its root.
    """
    path = posixpath.join(posixpath.dirname(group[0].path), f"merged-{uuid.uuid4()}.zstd.parquet")
    with store.open_input_file(group[0].path) as first:
        form = pq.ParquetFile(first).schema
    leaves = [form.column(i).path for i in range(len(form.names))]
    plain = [leaf for leaf in leaves if leaf not in RAW_COLUMNS]
    with (
        store.open_output_stream(path) as out,
        pq.ParquetWriter(
            out,
            form.to_arrow_schema(),
            compression="zstd",
            compression_level=ZSTD_LEVEL,
            use_dictionary=plain,
            write_statistics=plain,
        ) as writer,
    ):
        for rows in _row_groups(group, store):
            writer.write_table(rows, row_group_size=max(1, rows.num_rows))
    return AddAction(
        path=path,
        size=store.get_file_info(path).size,
        partition_values=dict(group[0].partition),
        modification_time=time.time_ns() // 1_000_000,
        data_change=False,
        stats=json.dumps(_stats(group)),
    )


def _row_groups(group: Iterable[DataFile], store: FileSystem) -> Iterator[pa.Table]:
    waiting: list[pa.RecordBatch] = []
    for file in group:
        with store.open_input_file(file.path) as opened:
            parquet = pq.ParquetFile(opened)
            bytes_a_row = sum(
                parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)
            ) // max(1, parquet.metadata.num_rows)
            for batch in parquet.iter_batches(max(1, ROW_GROUP_BYTES // max(1, bytes_a_row))):
                waiting.append(batch)
                if sum(rows.nbytes for rows in waiting) >= ROW_GROUP_BYTES:
                    yield pa.Table.from_batches(waiting)
                    waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)


def _stats(group: Sequence[DataFile]) -> dict[str, Any]:
    """What a query may skip the new file by: the bounds that all of the old ones have."""
    least = set.intersection(*(set(file.least) for file in group))
    most = set.intersection(*(set(file.most) for file in group))
    return {
        "numRecords": sum(file.rows for file in group),
        "minValues": {name: min(file.least[name] for file in group) for name in least},
        "maxValues": {name: max(file.most[name] for file in group) for name in most},
        "nullCount": {},
    }


def _below(prefix: str, row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name.removeprefix(prefix), value) for name, value in row.items() if name.startswith(prefix))


def _comparable(bounds: Iterable[tuple[str, Any]]) -> dict[str, int | str]:
    """Those that JSON knows as they are."""
    return {name: value for name, value in bounds if type(value) in {int, str}}
