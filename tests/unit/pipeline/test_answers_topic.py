"""Answers are read back from the tables as nodes publish them, and the commands print them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import LINE, conversation, record_of, tables_of, verify_step_of
from typer.testing import CliRunner

from ops.cli.corpus import _report_progress, build_tables
from ops.cli.main import app
from pipeline.answers_topic import FinishedRequest, RebuildCounts, TopicStats, list_finished, read_answers
from pipeline.batches import Record
from pipeline.delta import DeltaLog
from schemas.answers import PROMPT_TOKENS, Answer, encode
from schemas.settings import Tables

TIME = datetime.fromtimestamp(1_700_000_000, UTC)
SPAN = (TIME - timedelta(hours=1), TIME + timedelta(hours=1))


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DeltaLog:
    """Create tables that the CLI finds too."""
    monkeypatch.setenv("AURORA_TABLES__URI", str(tmp_path))
    return DeltaLog(Tables(uri=str(tmp_path)))


def write(tables: DeltaLog, *records: Record) -> None:
    for name, rows in tables_of(*records).items():
        if rows.num_rows:
            tables.append(name, rows)


def read(tables: DeltaLog, requests: list[FinishedRequest]) -> tuple[list[Answer], RebuildCounts]:
    counts = RebuildCounts(len(requests))
    return list(read_answers(tables, requests, counts)), counts


def test_an_answer_is_read_with_the_end_of_its_prompt(tables: DeltaLog) -> None:
    tokens = list(range(30, 50))
    write(tables, record_of("it's", conversation(tokens, prompt=11), offset=0, finish="stop"))
    requests = list_finished(tables, *SPAN)
    assert [(one.node, one.request, one.time) for one in requests] == [(requests[0].node, "it's", TIME)]
    [answer], counts = read(tables, requests)
    last = 11 + (len(tokens) - 11 - 1) // 2 * 2 + 1
    assert answer.tokens.tolist() == tokens[11 - PROMPT_TOKENS : last]
    assert (answer.prompt_tokens, answer.line, answer.request) == (PROMPT_TOKENS, LINE, "it's")
    assert answer.time_us == TIME.timestamp() * 1e6
    assert counts.incomplete == 0


def test_only_requests_that_ended_with_an_answer_in_the_span_are_listed(tables: DeltaLog) -> None:
    steps = conversation(list(range(30, 40)), prompt=3)
    late = [replace(step, time_us=step.time_us + 7_200_000_000) for step in steps]
    write(
        tables,
        record_of("a", steps, offset=0, finish="stop"),
        record_of("cut", steps, offset=1, last=False),
        record_of("cancelled", steps, offset=3, finish="cancelled"),
        record_of("late", late, offset=2, finish="stop"),
    )
    assert [one.request for one in list_finished(tables, *SPAN)] == ["a"]
    assert list_finished(tables, SPAN[1], SPAN[1] + timedelta(minutes=30)) == []


def test_a_request_without_all_of_its_rows_is_counted_and_skipped(tables: DeltaLog) -> None:
    steps = conversation(list(range(30, 44)), prompt=3)
    write(
        tables,
        record_of("whole", steps, offset=0, finish="stop"),
        record_of("torn", steps[2:], offset=1, chunk=1, finish="stop"),
    )
    requests = list_finished(tables, *SPAN)
    answers, counts = read(tables, requests)
    assert [answer.request for answer in answers] == ["whole"]
    assert (counts.requests, counts.incomplete) == (2, 1)


def test_a_prompt_of_several_rows_is_joined(tables: DeltaLog) -> None:
    first = replace(verify_step_of(0, 0, [1, 2, 3], 0), bonus=None, top_ids=np.zeros((0, 3), np.int32))
    first = replace(first, top_logprobs=np.zeros((0, 3), np.float32))
    steps = [first, verify_step_of(0, 3, [4, 5], 6), verify_step_of(1, 5, [6], 7)]
    write(tables, record_of("a", steps, offset=0, finish="stop"))
    [answer], _ = read(tables, list_finished(tables, *SPAN))
    assert (answer.tokens.tolist(), answer.prompt_tokens) == ([1, 2, 3, 4, 5, 6, 7], 5)


@given(
    sizes=st.lists(st.integers(0, 30), max_size=10),
    damaged=st.integers(0, 3),
)
def test_statistics_count_every_record(sizes: list[int], damaged: int) -> None:
    stats = TopicStats()
    for number, size in enumerate(sizes):
        time_us = 1_000_000 * number
        stats.add(encode(Answer(LINE, "n", str(number), "math", time_us, 0, np.zeros(size, np.int32))))
    for _ in range(damaged):
        stats.add(b"\x09")
    assert (stats.answers, stats.tokens, stats.corrupt) == (len(sizes), sum(sizes), damaged)
    assert stats.tokens_by_label == ({"math": sum(sizes)} if sizes else {})
    if sizes:
        assert stats.newest is not None
        assert stats.newest.timestamp() == len(sizes) - 1
    assert len(list(build_tables(stats, TIME))) == (4 if sizes else 1)


def test_rebuild_shows_what_it_would_publish(tables: DeltaLog) -> None:
    time_us = round(datetime.now(UTC).timestamp() * 1e6) - 60_000_000
    steps = [replace(step, time_us=time_us) for step in conversation(list(range(30, 40)), prompt=3)]
    write(tables, replace(record_of("a", steps, offset=0, finish="stop"), time_us=time_us))
    shown = CliRunner().invoke(app, ["corpus", "rebuild", "--from", "1h", "--dry-run", "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["requests"] == 1
    assert "nothing was published" in shown.stderr
    late = CliRunner().invoke(app, ["corpus", "rebuild", "--from", "2d", "--to", "1h", "--dry-run", "--json"])
    assert json.loads(late.stdout)["requests"] == 0


def test_a_corpus_of_single_requests_cannot_be_rebuilt(tables: DeltaLog) -> None:
    result = CliRunner().invoke(app, ["corpus", "rebuild", "--set", "serve.suffix_scope=request"])
    assert result.exit_code == 2
    assert "serve.suffix_scope" in result.stderr


def test_ctrl_c_ends_a_rebuild_with_its_counts(capsys: pytest.CaptureFixture[str]) -> None:
    def parts() -> Iterator[RebuildCounts]:
        yield RebuildCounts(9, published=4)
        raise KeyboardInterrupt

    counts, cut_short = _report_progress(parts(), RebuildCounts(9))
    assert (counts.published, cut_short) == (4, True)
    assert "4 of 9 answers published" in capsys.readouterr().err
