"""Tests of queries over real tables, and of the commands that print them."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from recorded import conversation, record_of, tables_of, verify_step_of
from typer.testing import CliRunner, Result

from ops.cli.main import app
from pipeline.batches import Record
from pipeline.delta import DeltaLog, TableError
from pipeline.offsets import SourcePartition
from pipeline.trace_queries import compute_stats, find_commit, follow_steps, read_newest_steps
from schemas.batches import DEAD_LETTERS
from schemas.settings import Tables
from schemas.trace.record import ROOT, DraftSource

SOURCE = SourcePartition("traces", 0)
ENDS = [-1, 3, 3, 7, 8, 8, 20]
"""Last offset by version. Compaction and commits of other partitions do not change it."""
NOW_US = 1_700_000_000_000_000
SPECULATOR, SUFFIX = int(DraftSource.SPECULATOR), int(DraftSource.SUFFIX)
BOTH = SPECULATOR | SUFFIX


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DeltaLog:
    """Create tables that the CLI finds too."""
    monkeypatch.setenv("AURORA_TABLES__URI", str(tmp_path))
    return DeltaLog(Tables(uri=str(tmp_path)))


def write(tables: DeltaLog, *records: Record) -> None:
    for name, rows in tables_of(*records).items():
        if rows.num_rows:
            tables.append(name, rows)


def aurora(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["traces", *arguments])


def tokens(count: int, first: int = 1) -> list[int]:
    return list(range(first, first + count))


def a_tree() -> list[Any]:
    """Return a prompt, and a verify step with two branches: 5 6, of which 5 is accepted, and 7."""
    prompt = verify_step_of(0, 0, [1, 2, 3], 4)
    drafted = verify_step_of(1, 3, [4, 5], 9, [5, 6, 7])
    return [prompt, replace(drafted, draft_parents=(ROOT, 0, ROOT))]


def test_acceptance_length_counts_accepted_tokens_and_the_bonus_token(tables: DeltaLog) -> None:
    write(tables, record_of("a", conversation(tokens(12), prompt=4), offset=0))
    total = compute_stats(tables).total
    verify_steps = len(conversation(tokens(12), prompt=4)) - 1
    assert (total.requests, total.verify_steps, total.draft_tokens, total.accepted_tokens) == (
        1,
        verify_steps,
        2 * verify_steps,
        verify_steps,
    )
    assert total.acceptance_length == 2.0
    assert total.tokens == 1 + 2 * verify_steps, (
        "the bonus token of the prompt, and one draft token and one bonus token per verify step"
    )
    assert total.acceptance_by_depth == [1.0, 0.0]


def test_verify_step_without_a_draft_counts_with_no_accepted_tokens(tables: DeltaLog) -> None:
    write(tables, record_of("a", [*a_tree(), verify_step_of(2, 5, [9], 10)], offset=0))
    total = compute_stats(tables).total
    assert (total.verify_steps, total.acceptance_length) == (2, 1.5)
    assert (dict(total.drafted_to), dict(total.accepted_to)) == ({1: 1, 2: 1}, {1: 1, 2: 0})


def test_groups_add_up_to_the_total(tables: DeltaLog) -> None:
    write(
        tables,
        *(record_of(f"r{n}", conversation(tokens(8 + 2 * n), prompt=4), n, line=f"line-{n % 2}") for n in range(4)),
    )
    counted = compute_stats(tables, "line")
    assert set(counted.groups) == {"line-0", "line-1"}
    for figure in ("requests", "tokens", "verify_steps", "draft_tokens", "accepted_tokens"):
        assert sum(getattr(one, figure) for one in counted.groups.values()) == getattr(counted.total, figure)


def test_a_version_is_counted_by_its_own_drafts_and_the_total_by_whole_drafts(tables: DeltaLog) -> None:
    prompt, *steps = conversation(tokens(15), prompt=4)
    sources = [None, (SPECULATOR, SUFFIX), (BOTH, SPECULATOR), (SUFFIX, SUFFIX), (SUFFIX, SPECULATOR)]
    drafted = [
        replace(step, draft_sources=of_step, speculator="" if of_step == (SUFFIX, SUFFIX) else "1")
        for step, of_step in zip(steps, sources, strict=True)
    ]
    write(tables, record_of("a", [prompt, *drafted], 0))
    counted = compute_stats(tables, "speculator")
    version, none = counted.groups["1"], counted.groups[""]
    assert (version.verify_steps, version.draft_tokens, version.accepted_tokens) == (3, 5, 3)
    assert (dict(version.drafted_to), version.acceptance_by_depth) == ({1: 3, 2: 2}, [1.0, 0.0])
    assert (none.verify_steps, none.draft_tokens, none.accepted_tokens) == (1, 2, 1)
    total = counted.total
    assert (total.verify_steps, total.draft_tokens, total.accepted_tokens) == (5, 10, 5)
    assert (total.suffix_accepted_tokens, none.suffix_accepted_tokens, version.suffix_accepted_tokens) == (2, 1, 0)


def test_verify_steps_are_shown_with_their_drafters(tables: DeltaLog) -> None:
    prompt, *steps = conversation(tokens(11), prompt=4)
    drafters: list[tuple[str, tuple[int, ...] | None]] = [("1", None), ("1", (BOTH, SUFFIX)), ("", (SUFFIX, SUFFIX))]
    drafted = [
        replace(step, speculator=version, draft_sources=of_step)
        for step, (version, of_step) in zip(steps, drafters, strict=True)
    ]
    write(tables, record_of("a", [prompt, *drafted], 0))
    assert re.findall(r" by (\S+)", aurora("tail", "-n", "3").stdout) == ["1", "1+suffix", "suffix"]


def test_missing_chunks_and_unfinished_requests_are_counted(tables: DeltaLog) -> None:
    verify_steps = conversation(tokens(8), prompt=4)
    write(tables, record_of("holes", verify_steps, 0, chunk=1), record_of("holes", verify_steps, 1, chunk=4))
    write(tables, record_of("whole", verify_steps, 2))
    assert (compute_stats(tables).chunks.missing, compute_stats(tables).chunks.unfinished) == (3, 0)
    earlier = compute_stats(tables, since=datetime.fromtimestamp(NOW_US / 1e6 - 1, UTC)).chunks
    assert earlier.missing == 2, "chunks of a request before that time are not missing"


def test_since_excludes_older_verify_steps(tables: DeltaLog) -> None:
    write(tables, record_of("a", conversation(tokens(8), prompt=4), 0))
    later = compute_stats(tables, "node", since=datetime.fromtimestamp(NOW_US / 1e6 + 1, UTC))
    assert (later.total.verify_steps, later.total.acceptance_length, later.groups) == (0, None, {})
    assert later.table_tokens > 0, "bytes and tokens cover all rows"


def test_dead_letters_are_counted_by_reason(tables: DeltaLog) -> None:
    row = {"topic": "t", "partition": 0, "time": NOW_US, "day": 0, "detail": ""}
    letters = [{**row, "offset": n, "reason": "corrupt" if n else "empty"} for n in range(3)]
    tables.append("dead_letters", pa.Table.from_pylist(letters, schema=DEAD_LETTERS))
    assert compute_stats(tables).dead_letters == {"corrupt": 2, "empty": 1}


def test_empty_tables_have_no_means(tables: DeltaLog) -> None:
    counted = compute_stats(tables, "label")
    assert (counted.total.acceptance_length, counted.bytes_per_token, counted.groups) == (None, None, {})


def test_newest_verify_steps_are_in_the_order_of_their_commits(tables: DeltaLog) -> None:
    for n in range(9):
        write(tables, record_of(f"r{n}", conversation(tokens(8), prompt=4), n))
    for count in (0, 1, 5, 11, 1000):
        rows, version = read_newest_steps(tables, count)
        everything = tables.read_added("traces", 0, version)
        assert rows["request"].to_pylist() == everything["request"].to_pylist()[len(everything) - rows.num_rows :]
        assert rows.num_rows == min(count, len(everything))


def test_follow_yields_each_commit_once(tables: DeltaLog) -> None:
    write(tables, record_of("a", conversation(tokens(8), prompt=4), 0))
    _, version = read_newest_steps(tables, 1)
    follower = follow_steps(tables, version, poll_s=0)
    for name in ("b", "c"):
        write(tables, record_of(name, conversation(tokens(8), prompt=4), 1))
        assert set(next(follower)["request"].to_pylist()) == {name}


def test_stats_command_prints_text_and_json(tables: DeltaLog) -> None:
    write(tables, record_of("a", conversation(tokens(12), prompt=4), offset=0))
    result = aurora("stats", "--by", "speculator")
    assert result.exit_code == 0, result.output
    assert "missing chunks: 0" in result.stdout
    plain = json.loads(aurora("stats", "--by", "speculator", "--json").stdout)
    assert plain["acceptance_length"] == plain["by_speculator"]["1"]["acceptance_length"] == 2.0
    assert plain["table_bytes_per_token"] > 0


def test_tail_command_prints_accepted_and_rejected_tokens_on_one_line(tables: DeltaLog) -> None:
    write(tables, record_of("a", a_tree(), offset=0))
    result = aurora("tail", "-n", "1")
    assert result.stdout.endswith("node-0 a #1 by 1  1 of 3 accepted: 5 | 6 7 -> 9\n")
    assert json.loads(aurora("tail", "-n", "1", "--json").stdout)["draft_tokens"] == [5, 6, 7]


def test_sql_command_prints_every_format(tables: DeltaLog) -> None:
    write(tables, record_of("a", a_tree(), offset=0))
    query = "select verify_step, tokens, time, cardinality(tokens) as n from traces order by verify_step"
    plain = json.loads(aurora("sql", query, "--json").stdout)
    assert [(row["verify_step"], row["tokens"], row["n"]) for row in plain] == [(0, [1, 2, 3], 3), (1, [4, 5], 2)]
    assert plain[0]["time"] == "2023-11-14T22:13:20+00:00"
    rows = list(csv.DictReader(io.StringIO(aurora("sql", query, "--csv").stdout)))
    assert [json.loads(row["tokens"]) for row in rows] == [[1, 2, 3], [4, 5]]
    assert "[1, 2, 3]" in aurora("sql", query).stdout
    assert json.loads(aurora("sql", "select 1 as one from traces where false", "--json").stdout) == []


def test_sql_command_writes_no_json_that_other_programs_reject(tables: DeltaLog) -> None:
    write(tables, record_of("r", a_tree(), 0))
    query = "select cast('NaN' as double) as n, make_array(cast('inf' as double), 1.5) as list from traces"
    assert json.loads(aurora("sql", f"{query} where verify_step = 0", "--json").stdout, parse_constant=pytest.fail) == [
        {"n": None, "list": [None, 1.5]}
    ]


def test_sql_command_finds_tables_in_any_case(tables: DeltaLog) -> None:
    write(tables, record_of("r", a_tree(), 0))
    count = "SELECT count(*) AS n FROM TRACES"
    assert json.loads(aurora("sql", count, "--json").stdout)[0]["n"] > 0
    assert json.loads(aurora("sql", count, "--json", "--version", "0").stdout) == [{"n": 0}]


@pytest.mark.parametrize("folder", ["a b", "a#b", "a?b", "a%b", "ü", "a*b", "{x}", "a~b", "a:b"])
def test_tables_live_in_a_folder_of_any_name(tmp_path: Path, folder: str) -> None:
    tables = DeltaLog(Tables(uri=str(tmp_path / folder)))
    write(tables, record_of("r", a_tree(), 0))
    assert DeltaLog(Tables(uri=str(tmp_path / folder))).row_count("traces") > 0
    assert [path.name for path in tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize("folder", ["a|b", "[x]", "a^b"])
def test_a_panic_of_the_library_is_an_error_with_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    with pytest.raises(TableError, match=rf"{re.escape(folder)}/tables/.*check tables\.uri"):
        write(DeltaLog(Tables(uri="tables")), record_of("r", a_tree(), 0))


def test_sql_command_reads_earlier_versions(tables: DeltaLog) -> None:
    for n in range(3):
        write(tables, record_of(f"r{n}", a_tree(), n))
    count = "select count(*) as n from traces"

    def rows(*arguments: str) -> int:
        return int(json.loads(aurora("sql", count, "--json", *arguments).stdout)[0]["n"])

    numbers = [rows("--version", str(version)) for version in range(4)]
    assert numbers == [0, 2, 4, 6]
    assert all(before < after for before, after in pairwise(numbers))
    assert (rows(), rows("--at", datetime.now(UTC).isoformat())) == (6, 6)


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        (["select nope from traces"], "No field named nope"),
        (["select * fom traces"], "found: fom"),
        (["select 1 from traces, accepted", "--version", "1"], "--version needs a query on one table"),
        (["select 1 from traces", "--version", "1", "--at", "1h"], "--version and --at exclude each other"),
        (["select 1 from traces", "--at", "yesterday"], "'yesterday' is not a time"),
        (["select 1 from traces", "--version", "99"], "99"),
    ],
)
def test_failed_query_prints_one_line(tables: DeltaLog, arguments: list[str], result: str) -> None:
    tables.create()
    answer = aurora("sql", *arguments)
    assert answer.exit_code == 2
    assert result in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_tables_command_lists_columns(tables: DeltaLog) -> None:
    write(tables, record_of("a", a_tree(), offset=0))
    listed = {one["table"]: one for one in json.loads(aurora("tables", "--json").stdout)}
    assert (listed["traces"]["rows"], listed["traces"]["version"]) == (2, 1)
    assert listed["accepted"]["columns"]["features"] == "binary"
    assert "draft_parents" in aurora("tables").stdout


def test_missing_tables_are_not_created_and_the_setting_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["traces", "stats", f"--set=tables.uri={tmp_path / 'none'}"])
    assert result.exit_code == 2
    assert "tables.uri" in result.stderr
    assert not (tmp_path / "none").exists()


class VersionedLog:
    def __init__(self, oldest: int = 0) -> None:
        self.oldest = oldest

    def version(self, name: str) -> int:
        return len(ENDS) - 1

    def last_offset(self, name: str, source: SourcePartition, version: int | None = None) -> int:
        if version is not None and version < self.oldest:
            raise TableError("too old")
        return ENDS[-1 if version is None else version]


@pytest.mark.parametrize("offset", range(25))
@pytest.mark.parametrize("oldest", range(len(ENDS)))
def test_find_commit_returns_the_first_readable_version_with_the_record(offset: int, oldest: int) -> None:
    holding = [version for version, end in enumerate(ENDS) if end >= offset and version >= oldest]
    assert find_commit(VersionedLog(oldest), "accepted", SOURCE, offset) == (holding[0] if holding else None)
