"""Tables that a release without some nullable columns wrote are read, written and maintained by this one, and the
reverse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, Schema, write_deltalake
from recorded import conversation, record_of, tables_of

from pipeline.compaction import list_data_files
from pipeline.delta import TABLE_PROPERTIES, DeltaLog
from pipeline.maintenance import Maintenance
from pipeline.offsets import COMMIT_ORDER, Batch, OffsetCommitter, SourcePartition
from schemas.batches import PARTITIONED_BY, TABLES
from schemas.settings import Tables
from schemas.trace.record import DraftSource, VerifyStep

ADDED = "draft_sources"
EXTENDED = ("rejected", "traces")
SOURCE = SourcePartition("traces", 0)
MIXED = (int(DraftSource.SPECULATOR | DraftSource.SUFFIX), int(DraftSource.SUFFIX))


def older_rows(offset: int) -> dict[str, pa.Table]:
    """Return the rows of one record as the older release builds them."""
    rows = tables_of(record_of(f"request-{offset}", conversation(range(9), 4), offset))
    return {name: rows[name].drop_columns([ADDED]) if name in EXTENDED else rows[name] for name in COMMIT_ORDER}


def newer_rows(offset: int) -> dict[str, pa.Table]:
    def with_sources(step: VerifyStep) -> VerifyStep:
        return replace(step, draft_sources=MIXED) if step.draft_tokens else step

    return tables_of(record_of(f"request-{offset}", [with_sources(s) for s in conversation(range(9), 4)], offset))


@pytest.fixture
def settings(tmp_path: Path) -> Tables:
    return Tables(uri=str(tmp_path), batches_retention="9999d", traces_retention="9999d")


@pytest.fixture
def older(settings: Tables) -> Tables:
    """Tables of the older release with two records, one in each commit."""
    for name, schema in TABLES.items():
        fields = [field for field in schema if field.name != ADDED]
        uri, columns = f"{settings.uri}/{name}", list(PARTITIONED_BY[name])
        DeltaTable.create(uri, pa.schema(fields), partition_by=columns, configuration=TABLE_PROPERTIES)
    for offset in range(2):
        for name, rows in older_rows(offset).items():
            write_deltalake(f"{settings.uri}/{name}", rows, mode="append")
    return settings


def by_offset(rows: pa.Table) -> Iterator[tuple[int, Sequence[int] | None]]:
    """Yield offset and sources of each verify step or branch with a draft."""
    return zip(rows["offset"].to_pylist(), rows[ADDED].to_pylist(), strict=True)


@pytest.mark.parametrize("name", EXTENDED)
def test_opening_an_older_table_adds_the_column_once(older: Tables, name: str) -> None:
    log = DeltaLog(older)
    assert log.version(name) == 3
    assert log.version(name) == 3
    assert Schema.from_arrow(TABLES[name]) == log.open(name).schema()
    assert DeltaTable(f"{older.uri}/{name}").schema() == log.open(name).schema()


@pytest.mark.parametrize("name", EXTENDED)
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
        assert {offset for offset, sources in by_offset(rows) if sources is None} >= {0, 1}
        assert {tuple(sources) for offset, sources in by_offset(rows) if sources is not None} == {MIXED}
        assert {offset for offset, sources in by_offset(rows) if sources is not None} == {2}
    counted = log.query(f"select count(*) as n from {name} where {ADDED} is not null").read_all()
    assert counted["n"].to_pylist() == [sum(sources is not None for _, sources in by_offset(log.read(name)))]
    before = log.read(name, at=2)
    assert before.schema == TABLES[name]
    assert set(before["offset"].to_pylist()) == {0, 1}
    assert before[ADDED].null_count == before.num_rows


@pytest.mark.parametrize("name", EXTENDED)
def test_a_reader_that_has_read_everything_continues_behind_the_added_column(older: Tables, name: str) -> None:
    log = DeltaLog(older)
    added_at = log.version(name)
    assert log.read_added(name, added_at - 1, added_at).num_rows == 0
    OffsetCommitter(log).commit([Batch(SOURCE, 2, newer_rows(2))])
    assert set(log.read_added(name, added_at - 1, log.version(name))["offset"].to_pylist()) == {2}


def test_compaction_merges_files_of_both_releases(older: Tables) -> None:
    log = DeltaLog(older)
    OffsetCommitter(log).commit([Batch(SOURCE, 2, newer_rows(2))])
    order = [("offset", "ascending"), ("verify_step", "ascending")]
    before = {name: log.read(name).sort_by(order) for name in EXTENDED}
    assert not any(result.error for result in Maintenance(older).run())
    for name in EXTENDED:
        assert len(list_data_files(log.open(name))) == 1
        assert log.read(name).sort_by(order).equals(before[name])


def test_processes_that_open_an_older_table_together_add_the_column_once(older: Tables) -> None:
    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda _: DeltaLog(older).read("traces").schema, range(8)))
    assert names == [TABLES["traces"]] * 8
    assert DeltaLog(older).version("traces") == 3


def test_this_release_writes_to_tables_with_a_column_of_a_newer_one(settings: Tables) -> None:
    log = DeltaLog(settings)
    log.create()
    for name in COMMIT_ORDER:
        newer = Schema.from_arrow(pa.schema([pa.field("newer", pa.string())])).fields
        DeltaTable(f"{settings.uri}/{name}").alter.add_columns(newer)
    OffsetCommitter(log).commit([Batch(SOURCE, 0, newer_rows(0))])
    assert set(log.read("traces")["offset"].to_pylist()) == {0}
    assert log.query("select distinct newer from traces").read_all()["newer"].to_pylist() == [None]
    assert not any(result.error for result in Maintenance(settings).run())
