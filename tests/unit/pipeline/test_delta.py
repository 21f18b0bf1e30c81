"""Tests of reading the tables: newest and earlier versions, and SQL."""

from __future__ import annotations

import os
import shutil
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from recorded import conversation, record_of, tables_of

from pipeline.batches import Record, build
from pipeline.delta import DeltaLog, TableError
from pipeline.offsets import SourcePartition
from schemas.batches import TABLES
from schemas.settings import Tables

FILLED = ("rejected", "traces", "accepted")


@pytest.fixture
def log(tmp_path: Path) -> DeltaLog:
    """Create tables with four records, one in each commit."""
    tables = DeltaLog(Tables(uri=str(tmp_path)))
    tables.create()
    for offset in range(4):
        rows = tables_of(record_of(f"request-{offset}", conversation(range(9), 4), offset))
        for name in FILLED:
            tables.append(name, rows[name])
    letter = Record("traces", 0, 4, 1_700_000_000_000_000, b"key", b"junk", (("schema", None),))
    tables.append("dead_letters", build([letter], 32).rows["dead_letters"])
    return tables


def offsets(rows: pa.Table) -> list[int]:
    return sorted(set(rows["offset"].to_pylist()))


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_read_as_they_were_written(log: DeltaLog, name: str) -> None:
    rows = log.read(name)
    assert rows.schema == TABLES[name]
    added = log.read_added(name, 0, log.version(name))
    assert added.schema == TABLES[name]
    assert sorted(map(str, rows.to_pylist())) == sorted(map(str, added.to_pylist()))
    assert rows.num_rows == log.row_count(name)


def test_added_rows_of_one_line_are_read_from_its_files_alone(log: DeltaLog, tmp_path: Path) -> None:
    rows = tables_of(record_of("request-4", conversation(range(9), 4), 4, line="other"))["accepted"]
    log.append("accepted", rows)
    newest = log.version("accepted")
    assert offsets(log.read_added("accepted", 0, newest, ["offset"], "other")) == [4]
    assert offsets(log.read_added("accepted", 2, newest, ["offset", "line"], "target-draft")) == [2, 3]
    shutil.rmtree(next((tmp_path / "accepted").glob("line=other")))
    assert offsets(log.read_added("accepted", 0, newest, None, "target-draft")) == [0, 1, 2, 3]


def test_read_offsets_returns_a_range_ordered_by_offset(log: DeltaLog) -> None:
    columns = ("offset", "verify_step", "draft_tokens")
    rows = log.read_offsets("traces", SourcePartition("traces", 0), range(1, 3), columns)
    assert rows.schema == pa.schema([TABLES["traces"].field(name) for name in columns])
    assert rows["offset"].to_pylist() == sorted(rows["offset"].to_pylist())
    assert offsets(rows) == [1, 2]
    assert log.read_offsets("traces", SourcePartition("traces", 1), range(9), columns).num_rows == 0
    assert log.read_offsets("traces", SourcePartition("it's", 0), range(9), columns).num_rows == 0


def test_earlier_version_is_read_by_number_and_by_time(log: DeltaLog, tmp_path: Path) -> None:
    assert offsets(log.read("accepted", ["offset"], at=2)) == [0, 1]
    start = datetime.now(UTC) - timedelta(hours=9)
    for version in range(5):
        at = (start + timedelta(hours=version)).timestamp()
        os.utime(tmp_path / f"accepted/_delta_log/{version:020}.json", (at, at))
    assert offsets(log.read("accepted", ["offset"], at=start + timedelta(hours=2, minutes=30))) == [0, 1]
    assert offsets(log.read("accepted", ["offset"], at=(start + timedelta(hours=3)).replace(tzinfo=None))) == [0, 1, 2]
    assert offsets(log.read("accepted", ["offset"], at=datetime.now(UTC))) == [0, 1, 2, 3]
    assert log.read("accepted", at=datetime.now(UTC) - timedelta(days=9)).num_rows == 0
    with pytest.raises(TableError, match="accepted, version 99,"):
        log.read("accepted", at=99)


def test_query_covers_all_tables_and_returns_standard_types(log: DeltaLog) -> None:
    answer = log.query(
        "select a.offset, a.line, a.features, count(*) as verify_steps from accepted a join traces t using (offset) "
        "group by a.offset, a.line, a.features order by a.offset"
    ).read_all()
    assert answer["offset"].to_pylist() == [0, 1, 2, 3]
    assert answer.schema.types[1:3] == [pa.string(), pa.binary()]
    nested = log.query("select headers, headers[1]['name'] as first from dead_letters").read_all()
    assert nested.to_pylist() == [{"headers": [{"name": "schema", "value": None}], "first": "schema"}]
    assert log.query("select count(*) as n from traces", {"traces": 0}).read_all().to_pylist() == [{"n": 0}]
    assert set(TABLES) <= set(log.query("show tables").read_all()["table_name"].to_pylist())


@pytest.mark.parametrize(
    "sql",
    [
        "selct 1",
        "",
        "select nothing from accepted",
        "select * from elsewhere",
        "select cast(request as int) from accepted",
        "insert into promotions select * from promotions",
        "delete from accepted",
    ],
)
def test_invalid_or_writing_query_is_rejected(log: DeltaLog, sql: str) -> None:
    with pytest.raises(TableError, match="query: "):
        log.query(sql).read_all()
    assert log.row_count("accepted") == 4


def test_unreachable_store_is_an_error_that_names_the_settings() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "timeout": "100ms",
            "retry_timeout": "200ms",
        }
        with pytest.raises(TableError, match=r"max_retries 3, .*check tables\.uri and tables\.storage_options$"):
            DeltaLog(Tables(uri="s3://bucket/tables", storage_options=options)).version("traces")


def test_missing_file_is_an_error_and_not_fewer_rows(log: DeltaLog, tmp_path: Path) -> None:
    shutil.rmtree(next((tmp_path / "accepted").glob("line=*")))
    with pytest.raises(TableError, match="accepted"):
        log.read("accepted")
    with pytest.raises(TableError, match="accepted"):
        log.read_added("accepted", 0, 4)
    with pytest.raises(TableError, match="query"):
        log.query("select request from accepted").read_all()


def test_unreadable_log_names_its_setting_when_a_transaction_is_read(tmp_path: Path) -> None:
    tables = DeltaLog(Tables(uri=str(tmp_path)))
    tables.snapshot("traces").append(TABLES["traces"].empty_table(), {"writer": 7})
    DeltaTable(str(tmp_path / "traces")).create_checkpoint()
    snapshot = DeltaLog(Tables(uri=str(tmp_path))).snapshot("traces")
    (checkpoint,) = (tmp_path / "traces" / "_delta_log").glob("*.checkpoint.parquet")
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:10])
    with pytest.raises(TableError, match=r"tables\.uri"):
        snapshot.transaction("writer")
    checkpoint.write_bytes(whole)
    assert snapshot.transaction("writer") == 7
