"""Reading the tables: their newest state, earlier ones, and answers to SQL."""

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
    """Tables to which four records were added, one in each commit."""
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
def test_rows_are_read_as_they_were_written_whatever_the_partitions(log: DeltaLog, name: str) -> None:
    rows = log.read(name)
    assert rows.schema == TABLES[name]
    added = log.read_added(name, 0, log.version(name))
    assert added.schema == TABLES[name]
    assert sorted(map(str, rows.to_pylist())) == sorted(map(str, added.to_pylist()))
    assert rows.num_rows == log.row_count(name)


def test_a_range_of_a_partition_is_read_in_the_order_of_its_offsets(log: DeltaLog) -> None:
    columns = ("offset", "verify_step", "draft_tokens")
    rows = log.read_offsets("traces", SourcePartition("traces", 0), range(1, 3), columns)
    assert rows.schema == pa.schema([TABLES["traces"].field(name) for name in columns])
    assert rows["offset"].to_pylist() == sorted(rows["offset"].to_pylist())
    assert offsets(rows) == [1, 2]
    assert log.read_offsets("traces", SourcePartition("traces", 1), range(9), columns).num_rows == 0
    assert log.read_offsets("traces", SourcePartition("it's", 0), range(9), columns).num_rows == 0


def test_an_earlier_state_is_read_by_version_and_by_time(log: DeltaLog, tmp_path: Path) -> None:
    assert offsets(log.read("accepted", ["offset"], at=2)) == [0, 1]
    begun = datetime.now(UTC) - timedelta(hours=9)
    for version in range(5):
        at = (begun + timedelta(hours=version)).timestamp()
        os.utime(tmp_path / f"accepted/_delta_log/{version:020}.json", (at, at))
    assert offsets(log.read("accepted", ["offset"], at=begun + timedelta(hours=2, minutes=30))) == [0, 1]
    assert offsets(log.read("accepted", ["offset"], at=(begun + timedelta(hours=3)).replace(tzinfo=None))) == [0, 1, 2]
    assert offsets(log.read("accepted", ["offset"], at=datetime.now(UTC))) == [0, 1, 2, 3]
    assert log.read("accepted", at=datetime.now(UTC) - timedelta(days=9)).num_rows == 0
    with pytest.raises(TableError, match="accepted, version 99,"):
        log.read("accepted", at=99)


def test_sql_is_answered_over_all_tables_in_types_that_other_tools_know(log: DeltaLog) -> None:
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
def test_sql_that_is_wrong_or_would_write_is_refused(log: DeltaLog, sql: str) -> None:
    with pytest.raises(TableError, match="query: "):
        log.query(sql).read_all()
    assert log.row_count("accepted") == 4


def test_a_store_that_never_answers_is_an_error_that_names_the_settings() -> None:
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


def test_a_file_that_is_gone_is_an_error_of_the_table_and_not_fewer_rows(log: DeltaLog, tmp_path: Path) -> None:
    shutil.rmtree(next((tmp_path / "accepted").glob("line=*")))
    with pytest.raises(TableError, match="accepted"):
        log.read("accepted")
    with pytest.raises(TableError, match="accepted"):
        log.read_added("accepted", 0, 4)
    with pytest.raises(TableError, match="query"):
        log.query("select request from accepted").read_all()


def test_a_log_that_cannot_be_read_where_a_transaction_is_asked_for_names_its_setting(tmp_path: Path) -> None:
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
