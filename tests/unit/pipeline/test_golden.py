"""A trace record and tables that this format's first release wrote are read, continued and maintained by every later
release of the same major version. ``python tests/unit/pipeline/test_golden.py`` wrote them: run it for a new version.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded import conversation, record_of

from pipeline.batches import Record, build
from pipeline.delta import DeltaLog
from pipeline.maintenance import Maintenance
from pipeline.offsets import COMMIT_ORDER, Batch, OffsetCommitter, SourcePartition
from schemas.settings import Tables
from schemas.trace.decoder import decode
from schemas.trace.record import FORMAT, FORMAT_MAJOR

GOLDEN = Path(__file__).parents[2] / "golden" / f"format-{FORMAT_MAJOR}"
SOURCE = SourcePartition("traces", 0)
YEARS = {"batches_retention": "36500d", "traces_retention": "36500d", "dead_letters_retention": "36500d"}


def golden_records() -> list[Record]:
    """Return two requests, and a record without a value, which becomes a dead letter."""
    requests = [record_of(f"request-{i}", conversation(range(9), 4), i, temperature=0.5, finish="stop") for i in (0, 1)]
    headers = (("format", FORMAT.encode()), *requests[0].headers)
    return [replace(requests[0], headers=headers), requests[1], Record("traces", 0, 2, 0, b"key", None, ())]


def as_json(rows: list[dict[str, Any]]) -> Any:
    """Return rows as JSON has them, in an order of their own."""
    plain = json.loads(json.dumps(rows, default=lambda value: value.hex() if isinstance(value, bytes) else str(value)))
    return sorted(plain, key=lambda row: json.dumps(row, sort_keys=True))


def write() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir(parents=True)
    records = golden_records()
    (GOLDEN / "record.bin").write_bytes(records[0].value or b"")
    log = DeltaLog(Tables(uri=str(GOLDEN / "tables")))
    committer = OffsetCommitter(log)
    for record in records:
        committer.commit([Batch(SOURCE, record.offset, build([record], 32).rows)])
    rows = {name: as_json(log.read(name).to_pylist()) for name in COMMIT_ORDER}
    (GOLDEN / "rows.json").write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    shutil.copytree(GOLDEN / "tables", tmp_path / "tables")
    return Tables(uri=str(tmp_path / "tables"), **YEARS)


@pytest.fixture
def rows() -> dict[str, list[dict[str, Any]]]:
    read: dict[str, list[dict[str, Any]]] = json.loads((GOLDEN / "rows.json").read_text())
    return read


def test_golden_record_has_its_content_and_its_rows(rows: dict[str, list[dict[str, Any]]]) -> None:
    record = golden_records()[0]
    golden = replace(record, value=(GOLDEN / "record.bin").read_bytes())
    assert repr(decode(golden.value or b"")) == repr(decode(record.value or b""))
    built = build([golden], 32)
    assert not built.dead_letters
    for name in ("traces", "accepted", "rejected"):
        assert as_json(built.rows[name].select(list(rows[name][0])).to_pylist()) == [
            row for row in rows[name] if row["offset"] == 0
        ]


@pytest.mark.parametrize("name", COMMIT_ORDER)
def test_golden_tables_have_their_rows(tables: Tables, rows: dict[str, list[dict[str, Any]]], name: str) -> None:
    log, columns = DeltaLog(tables), list(rows[name][0])
    assert as_json(log.read(name, columns).to_pylist()) == rows[name]
    assert as_json(log.read_added(name, 0, log.version(name), columns).to_pylist()) == rows[name]


def test_golden_tables_are_continued_where_they_end_and_maintained(tables: Tables) -> None:
    log = DeltaLog(tables)
    log.create()
    committer = OffsetCommitter(log)
    assert committer.next_offset(SOURCE) == 3
    committer.commit([Batch(SOURCE, 3, build([record_of("request-3", conversation(range(9), 4), 3)], 32).rows)])
    assert [done.error for done in Maintenance(tables).run() if done.error] == []
    assert sorted(log.read("accepted", ["offset"])["offset"].to_pylist()) == [0, 1, 3]


if __name__ == "__main__":
    write()
