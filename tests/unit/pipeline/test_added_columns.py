"""Tables that a release without some nullable columns wrote are read, written and maintained by this one, and the
reverse.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import CommitProperties, DeltaTable, Schema, Transaction, write_deltalake
from recorded import conversation, record_of, tables_of

from pipeline.compaction import list_data_files
from pipeline.delta import TABLE_PROPERTIES, DeltaLog, TableError
from pipeline.maintenance import Maintenance
from pipeline.offsets import COMMIT_ORDER, Batch, OffsetCommitter, SourcePartition, transaction_id
from schemas.batches import PARTITIONED_BY, TABLES
from schemas.settings import Tables
from schemas.trace.record import DraftSource, VerifyStep

SOURCE = SourcePartition("traces", 0)
MIXED = [int(DraftSource.SPECULATOR | DraftSource.SUFFIX), int(DraftSource.SUFFIX)]
SWAPPED = datetime(2026, 5, 17, tzinfo=UTC)
ADDED: dict[str, dict[str, object]] = {
    "accepted": {"last_chunk": True, "temperature": 0.75, "top_p": 0.5, "sampling_top_k": 20},
    "rejected": {"draft_sources": MIXED},
    "traces": {"draft_sources": MIXED, "active_since": SWAPPED},
}
"""Columns that the older release lacks, and their values in rows of this one."""


def older_rows(offset: int) -> dict[str, pa.Table]:
    """Return the rows of one record as the older release builds them."""
    rows = tables_of(record_of(f"request-{offset}", conversation(range(9), 4), offset))
    return {name: rows[name].drop_columns(list(ADDED.get(name, ()))) for name in COMMIT_ORDER}


def newer_rows(offset: int) -> dict[str, pa.Table]:
    def with_sources(step: VerifyStep) -> VerifyStep:
        if not step.draft_tokens:
            return step
        return replace(step, draft_sources=tuple(MIXED), active_since_us=round(SWAPPED.timestamp() * 1e6))

    verify_steps = [with_sources(s) for s in conversation(range(9), 4)]
    sampling = {"temperature": 0.75, "top_p": 0.5, "sampling_top_k": 20}
    return tables_of(record_of(f"request-{offset}", verify_steps, offset, **sampling))


@pytest.fixture
def settings(tmp_path: Path) -> Tables:
    return Tables(uri=str(tmp_path), batches_retention="9999d", traces_retention="9999d")


@pytest.fixture
def older(settings: Tables) -> Tables:
    """Tables of the older release with two records, one in each commit."""
    for name, schema in TABLES.items():
        fields = [field for field in schema if field.name not in ADDED.get(name, ())]
        uri, columns = f"{settings.uri}/{name}", list(PARTITIONED_BY[name])
        DeltaTable.create(uri, pa.schema(fields), partition_by=columns, configuration=TABLE_PROPERTIES)
    for offset in range(2):
        for name, rows in older_rows(offset).items():
            write_deltalake(f"{settings.uri}/{name}", rows, mode="append")
    return settings


def values_of(rows: pa.Table, column: str, *offsets: int) -> list[object]:
    """Return the values of a column in the rows of some records, without prompts: they have no draft, so no sources."""
    own = rows.filter(pc.field("offset").isin(offsets))
    if "draft_tokens" in rows.column_names:
        own = own.filter(pc.list_value_length(pc.field("draft_tokens")) > 0)
    found: list[object] = own[column].to_pylist()
    return found


@pytest.mark.parametrize("name", ADDED)
def test_opening_an_older_table_adds_the_columns_once(older: Tables, name: str) -> None:
    log = DeltaLog(older)
    assert log.version(name) == 3
    assert log.version(name) == 3
    assert Schema.from_arrow(TABLES[name]) == log.open(name).schema()
    assert DeltaTable(f"{older.uri}/{name}").schema() == log.open(name).schema()


@pytest.mark.parametrize("name", ADDED)
def test_rows_of_both_releases_are_read(older: Tables, name: str) -> None:
    log = DeltaLog(older)
    OffsetCommitter(log).commit([Batch(SOURCE, 2, newer_rows(2))])
    newest = log.version(name)
    for rows in (
        log.read(name),
        log.read_added(name, 0, newest),
        log.read_offsets(name, SOURCE, range(9), TABLES[name].names),
    ):
        assert rows.schema == TABLES[name]
        for column, value in ADDED[name].items():
            by_older, by_newer = (values_of(rows, column, *offsets) for offsets in ((0, 1), (2,)))
            assert by_older
            assert all(found is None for found in by_older)
            assert by_newer
            assert all(found == value for found in by_newer)
    before = log.read(name, at=2)
    assert before.schema == TABLES[name]
    assert set(before["offset"].to_pylist()) == {0, 1}
    for column in ADDED[name]:
        counted = log.query(f"select count(*) as n from {name} where {column} is not null").read_all()
        assert counted["n"].to_pylist() == [len(values_of(log.read(name), column, 2))]
        assert before[column].null_count == before.num_rows


@pytest.mark.parametrize("name", ADDED)
def test_a_reader_that_has_read_everything_continues_behind_the_added_column(older: Tables, name: str) -> None:
    log = DeltaLog(older)
    added_at = log.version(name)
    assert log.read_added(name, added_at - 1, added_at).num_rows == 0
    OffsetCommitter(log).commit([Batch(SOURCE, 2, newer_rows(2))])
    assert set(log.read_added(name, added_at - 1, log.version(name))["offset"].to_pylist()) == {2}


def test_compaction_merges_files_of_both_releases(older: Tables) -> None:
    log = DeltaLog(older)
    OffsetCommitter(log).commit([Batch(SOURCE, 2, newer_rows(2))])

    def read_ordered(name: str) -> pa.Table:
        rows = log.read(name)
        return rows.sort_by([(key, "ascending") for key in ("offset", "verify_step") if key in rows.column_names])

    before = {name: read_ordered(name) for name in ADDED}
    assert not any(result.error for result in Maintenance(older).run())
    for name in ADDED:
        assert len(list_data_files(log.open(name))) == 1
        assert read_ordered(name).equals(before[name])


def test_processes_that_open_an_older_table_together_add_the_column_once(older: Tables) -> None:
    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda _: DeltaLog(older).read("traces").schema, range(8)))
    assert names == [TABLES["traces"]] * 8
    assert DeltaLog(older).version("traces") == 3


@pytest.fixture
def newer(settings: Tables) -> Tables:
    """Tables with a record of this release, to which a newer one adds a column, and a record with values in it."""
    log = DeltaLog(settings)
    log.create()
    OffsetCommitter(log).commit([Batch(SOURCE, 0, newer_rows(0))])
    for name in COMMIT_ORDER:
        column = Schema.from_arrow(pa.schema([pa.field("newer", pa.string())])).fields
        DeltaTable(f"{settings.uri}/{name}").alter.add_columns(column)
        rows = newer_rows(1)[name]
        transaction = Transaction(transaction_id(name, SOURCE), 1)
        write_deltalake(
            f"{settings.uri}/{name}",
            rows.append_column("newer", pa.array(["yes"] * rows.num_rows)),
            mode="append",
            commit_properties=CommitProperties(app_transactions=[transaction]),
        )
    return settings


def test_worker_that_runs_while_a_newer_release_adds_a_column_continues(settings: Tables) -> None:
    log = DeltaLog(settings)
    committer = OffsetCommitter(log)
    committer.commit([Batch(SOURCE, 0, newer_rows(0))])
    for name in COMMIT_ORDER:
        column = Schema.from_arrow(pa.schema([pa.field("newer", pa.string())])).fields
        DeltaTable(f"{settings.uri}/{name}").alter.add_columns(column)
    committer.commit([Batch(SOURCE, 1, newer_rows(1))])
    assert set(log.read("traces")["offset"].to_pylist()) == {0, 1}


@pytest.mark.parametrize("name", ADDED)
def test_rows_of_a_newer_release_are_read_and_continued(newer: Tables, name: str) -> None:
    log = DeltaLog(newer)
    committer = OffsetCommitter(log)
    assert committer.next_offset(SOURCE) == 2
    committer.commit([Batch(SOURCE, 2, newer_rows(2))])
    for rows in (
        log.read(name),
        log.read_added(name, 0, log.version(name)),
        log.read_offsets(name, SOURCE, range(9), TABLES[name].names),
    ):
        assert rows.schema == TABLES[name]
        assert set(rows["offset"].to_pylist()) == {0, 1, 2}
    found = log.query(f'select distinct "offset", newer from {name}').read_all().to_pylist()
    assert {row["offset"]: row["newer"] for row in found} == {0: None, 1: "yes", 2: None}


def test_compaction_and_vacuum_keep_a_column_of_a_newer_release(newer: Tables) -> None:
    log = DeltaLog(newer)
    done = {result.table: result for result in Maintenance(newer).run()}
    assert [result.error for result in done.values() if result.error] == []
    assert done["traces"].compacted == 2
    found = log.query('select distinct "offset", newer from traces').read_all().to_pylist()
    assert {row["offset"]: row["newer"] for row in found} == {0: None, 1: "yes"}


def test_every_other_difference_is_refused_with_the_columns(settings: Tables) -> None:
    kept = [field for field in TABLES["traces"] if field.name not in {"node", "offset"}]
    columns = [*kept, pa.field("offset", pa.string()), pa.field("newer", pa.int64(), nullable=False)]
    DeltaTable.create(f"{settings.uri}/traces", pa.schema(columns))
    with pytest.raises(TableError, match=r"tables\.uri") as refused:
        DeltaLog(settings).create()
    for difference in (
        "- node: the table lacks it",
        "~ offset: string in the table, long in this release",
        "+ newer: not null in the table",
        "~ partitioned by [] in the table, by ['line', 'day'] in this release",
    ):
        assert difference in str(refused.value)
