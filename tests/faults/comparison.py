"""Compares the tables with the publisher's ledger, row by row.

The expected rows are built without ``pipeline``. The rows of ``traces`` are the published Arrow rows, with the
coordinates that the broker gave to their record. ``rejected`` has the rows whose draft was not fully accepted.
``accepted`` has one row per record, with all of its tokens and features. A record that the publisher corrupted, or sent
a second time, is a dead letter with all of its bytes. The tables are read by the Delta library alone. Derived columns
(contexts, masks, teachers) are compared on a sample, with the rows that ``pipeline.batches.build`` builds of the single
record.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from stream_worker import Ledger

from pipeline.batches import Record, build
from schemas.batches import TABLES, day_of
from schemas.settings import Settings

SAMPLE = 200
CHECKSUM_BYTES = 8
RECORD = ("partition", "offset")
VERIFY_STEP = (*RECORD, "verify_step", "position")


@dataclass(frozen=True, slots=True)
class ComparisonResult:
    """Counts of a comparison."""

    rows_published: int
    rows_in_table: int
    dead_letters: int
    rows_in_dead_letters: int
    lost: int
    """Expected rows that are missing from a table."""
    duplicated: int
    """Rows of a table that are not expected."""


def compare(ledger: Ledger, settings: Settings) -> ComparisonResult:
    """Compare the tables with the ledger.

    Raises:
        AssertionError: no row is missing or duplicated, but one differs.
    """
    assert not ledger.errors, ledger.errors[:3]
    records = sorted(ledger.records, key=lambda r: (r.partition, r.offset))
    valid = [r for r in records if (r.partition, r.offset) not in ledger.reasons]
    dead = [r for r in records if (r.partition, r.offset) in ledger.reasons]
    wire = [rows_on_the_wire(record) for record in valid]
    expected = {
        "traces": traces(valid, wire),
        "rejected": rejected(valid, wire),
        "accepted": accepted(valid, wire),
        "dead_letters": dead_letters(dead, ledger),
    }
    keys = {"traces": VERIFY_STEP, "rejected": VERIFY_STEP[:3], "accepted": RECORD, "dead_letters": RECORD}
    stored = {name: read(settings, name, keys[name]) for name in expected}
    lost = duplicated = 0
    for name, rows in expected.items():
        missing, excess = difference(rows, stored[name], keys[name])
        lost, duplicated = lost + missing, duplicated + excess
        if not missing and not excess:
            assert_same(name, rows, stored[name])
    if not lost and not duplicated:
        assert_sample_is_built(records, ledger, stored, settings.stream.context_tokens)
    rows_dead = sum(r.number("rows") or 0 for r in dead)
    return ComparisonResult(
        rows_published=sum(r.number("rows") or 0 for r in records),
        rows_in_table=stored["traces"].num_rows,
        dead_letters=stored["dead_letters"].num_rows,
        rows_in_dead_letters=rows_dead,
        lost=lost,
        duplicated=duplicated,
    )


def read(settings: Settings, name: str, key: Sequence[str]) -> pa.Table:
    """Return the rows of a table, ordered by its key."""
    address = f"{settings.tables.uri.rstrip('/')}/{name}"
    rows = DeltaTable(address, storage_options=dict(settings.tables.storage_options)).to_pyarrow_table()
    if name == "dead_letters":
        rows = rows.filter(pc.field("reason") != "hole")  # not a record; its campaign compares them with the log
    return in_order(rows.select(TABLES[name].names).cast(TABLES[name]), key)


def in_order(rows: pa.Table, key: Sequence[str]) -> pa.Table:
    return rows.take(pc.sort_indices(rows, sort_keys=[(column, "ascending") for column in key]))


def difference(expected: pa.Table, found: pa.Table, key: Sequence[str]) -> tuple[int, int]:
    """Return the number of missing and of excess rows, as multisets of their keys."""
    counted = [
        rows.select(key).append_column("n", pa.repeat(pa.scalar(n, pa.int64()), rows.num_rows))
        for rows, n in ((expected, 1), (found, -1))
    ]
    sums = pa.concat_tables(counted).group_by(list(key)).aggregate([("n", "sum")])["n_sum"].to_numpy()
    return int(sums[sums > 0].sum()), int(-sums[sums < 0].sum())


def assert_same(name: str, expected: pa.Table, found: pa.Table) -> None:
    """Assert that every expected column equals that of the table."""
    for column in expected.column_names:
        left, right = (rows[column].combine_chunks() for rows in (expected, found))
        assert left.equals(right), f"{name}.{column}: {first_difference(left, right)}"


def first_difference(left: pa.Array, right: pa.Array) -> str:
    at = next(i for i in range(len(left)) if not left[i].equals(right[i]))
    return f"row {at} should be {left[at]}, and is {right[at]}"


def assert_sample_is_built(
    records: Sequence[Record], ledger: Ledger, stored: dict[str, pa.Table], context_tokens: int
) -> None:
    """Assert that all columns equal the rows that the stream's builder builds of single records."""
    single = [r for r in records if ledger.reasons.get((r.partition, r.offset)) != "duplicate"]
    sample = random.Random(0).sample(single, min(SAMPLE, len(single)))
    built = build(sorted(sample, key=lambda r: (r.partition, r.offset)), context_tokens).rows
    chosen = pa.array([place(r.partition, r.offset) for r in sample])
    for name, rows in stored.items():
        places = place(rows["partition"].to_numpy().astype(np.int64), rows["offset"].to_numpy())
        of_sample = rows.filter(pc.is_in(pa.array(places), chosen))
        key = VERIFY_STEP if name == "traces" else [column for column in VERIFY_STEP[:3] if column in rows.column_names]
        assert_same(name, in_order(built[name], key), of_sample)


def place(partition: int, offset: int) -> int:
    """Return one number for partition and offset, or for arrays of them."""
    return (partition << 48) | offset


def rows_on_the_wire(record: Record) -> pa.Table:
    """Return the Arrow rows of a valid message, read with Arrow alone."""
    assert record.value is not None
    with pa.ipc.open_stream(record.value[:-CHECKSUM_BYTES]) as reader:
        return reader.read_all()


def lineage(records: Sequence[Record], wire: Sequence[pa.Table]) -> pa.Table:
    """Return one row per record: its coordinates and the fields of its envelope."""
    rows = []
    for record, table in zip(records, wire, strict=True):
        envelope = json.loads(table.schema.metadata[b"envelope"])
        drafting = [name for name in table["speculator"].to_pylist() if name]
        rows.append(
            {
                **envelope,
                "topic": record.topic,
                "partition": record.partition,
                "offset": record.offset,
                "last_chunk": envelope["last"],
                "start_time": envelope["start_us"],
                "speculator": drafting[-1] if drafting else "",
                "time": table["time"][-1].as_py(),
                "day": day_of(record.time_us),
            }
        )
    fields = {f.name: f for name in ("traces", "accepted") for f in TABLES[name]}
    known = [f for f in fields.values() if not rows or f.name in rows[0]]
    return pa.table([pa.array([row[f.name] for row in rows], f.type) for f in known], schema=pa.schema(known))


def spread(of_records: pa.Table, wire: Sequence[pa.Table]) -> pa.Table:
    """Return the rows of the records with the lineage of their record. A column of the row takes precedence."""
    lengths = [table.num_rows for table in wire]
    rows = pa.concat_tables([table.replace_schema_metadata(None) for table in wire])
    repeated = of_records.take(pa.array(np.repeat(np.arange(len(wire)), lengths)))
    for name in rows.column_names:
        if name in repeated.column_names:
            repeated = repeated.drop_columns(name)
    for name in repeated.column_names:
        rows = rows.append_column(name, repeated[name])
    return rows


def traces(records: Sequence[Record], wire: Sequence[pa.Table]) -> pa.Table:
    """Return the expected rows of ``traces``, with all columns."""
    if not records:
        return TABLES["traces"].empty_table()
    return spread(lineage(records, wire), wire).select(TABLES["traces"].names).cast(TABLES["traces"])


def rejected(records: Sequence[Record], wire: Sequence[pa.Table]) -> pa.Table:
    """Return the expected rows of ``rejected``, with the carried columns.

    Every draft of the traffic is a chain, so a verify step has at most one branch.
    """
    names = ["topic", *RECORD, "request", "chunk", "target", "line", "label", "speculator", "time", "day"]
    own = {
        "verify_step": "verify_step",
        "position": "root_position",
        "draft_tokens": "branch",
        "draft_logprobs": "draft_logprobs",
    }
    schema = pa.schema([TABLES["rejected"].field(name) for name in [*names, *own.values(), "accepted_prefix"]])
    if not records:
        return schema.empty_table()
    of_records = lineage(records, wire).select(names)
    rows = spread(of_records, [table.drop_columns(["time", "speculator"]) for table in wire])
    lengths = pc.list_value_length(rows["accepted"])
    rows = rows.append_column("accepted_prefix", lengths).filter(
        pc.less(lengths, pc.list_value_length(rows["draft_tokens"]))
    )
    renamed = [own.get(name, name) for name in rows.column_names]
    return rows.rename_columns(renamed).select(schema.names).cast(schema)


def accepted(records: Sequence[Record], wire: Sequence[pa.Table]) -> pa.Table:
    """Return the expected rows of ``accepted``: tokens and features of all verify steps of a record, end to end."""
    names = ["topic", *RECORD, "request", "chunk", "target", "line", "label", "speculator", "time", "day"]
    own = ["position", "tokens", "next_token", "features", "feature_width", "top_k"]
    schema = pa.schema([TABLES["accepted"].field(name) for name in [*names, *own]])
    rows = {
        "position": [table["position"][0] for table in wire],
        "tokens": joined((pc.list_flatten(table["tokens"]) for table in wire), pa.int32()),
        "next_token": [table["bonus"][-1] for table in wire],
        "features": [b"".join(table["features"].to_pylist()) for table in wire],
    }
    of_records = lineage(records, wire)
    columns = [
        pa.array(rows[f.name], f.type) if f.name in rows else of_records[f.name].combine_chunks() for f in schema
    ]
    return pa.table(columns, schema=schema)


def joined(parts: Iterable[pa.ChunkedArray], kind: pa.DataType) -> pa.Array:
    """Return an array with one list per part."""
    arrays = list(parts)
    offsets = np.cumsum([0, *map(len, arrays)])
    values = pa.chunked_array([chunk for array in arrays for chunk in array.chunks], kind).combine_chunks()
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def dead_letters(records: Sequence[Record], ledger: Ledger) -> pa.Table:
    """Return the expected dead letters, with all columns except the detail."""
    rows = [
        {
            "topic": r.topic,
            "partition": r.partition,
            "offset": r.offset,
            "time": r.time_us,
            "day": day_of(r.time_us),
            "reason": ledger.reasons[r.partition, r.offset],
            "rows": r.number("rows"),
            "key": r.key,
            "value": r.value,
            "size": None if r.value is None else len(r.value),
            "headers": [{"name": name, "value": value} for name, value in r.headers],
        }
        for r in records
    ]
    schema = pa.schema([f for f in TABLES["dead_letters"] if f.name != "detail"])
    return pa.Table.from_pylist(rows, schema=schema)
