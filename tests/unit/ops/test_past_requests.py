"""Requests are assembled from the tables; incomplete ones are skipped and counted."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from recorded import LINE, TARGET, TOP_K, WIDTH, conversation, record_of, tables_of
from typer.testing import CliRunner

from ops.cli.main import app
from pipeline.batches import Record
from pipeline.delta import DeltaLog
from schemas.settings import Settings, Tables, to_environ
from trainer.replay.past_requests import PastRequest, RequestFilter, list_requests, pin_versions, read_requests

TOKENS = range(13)
OF_TARGET = RequestFilter(TARGET)
TIME = datetime.fromtimestamp(1_700_000_000, UTC)


def states(tokens: torch.Tensor) -> torch.Tensor:
    return tokens[:, None].repeat(1, WIDTH).bfloat16()


@pytest.fixture
def log(tmp_path: Path) -> DeltaLog:
    made = DeltaLog(Tables(uri=str(tmp_path)))
    made.create()
    return made


def commit(log: DeltaLog, *records: Record) -> None:
    rows = tables_of(*records)
    for name in ("rejected", "traces", "accepted"):
        log.append(name, rows[name])


def asked(
    log: DeltaLog, counts: Counter[str], wanted: RequestFilter = OF_TARGET, accepted: int | None = None
) -> list[PastRequest]:
    at = pin_versions(log, accepted)
    return list(read_requests(log, list_requests(log, wanted, at), at, states, counts))


def test_chunks_are_joined_to_the_whole_request(log: DeltaLog) -> None:
    verify_steps, counts = conversation(TOKENS, 4), Counter[str]()
    commit(log, record_of("whole", verify_steps, 0))
    # As a node numbers them; the first is not the last one of its request.
    commit(log, record_of("cut", verify_steps[:2], 1, last=False), record_of("cut", verify_steps[2:], 2, chunk=1))
    one, other = sorted(asked(log, counts), key=lambda past: past.request, reverse=True)
    assert one.tokens_N.tolist() == list(TOKENS)
    assert (one.prompt, one.features_NF.shape, one.teacher.ids.shape) == (4, (12, WIDTH), (9, TOP_K))
    for name in ("tokens_N", "features_NF"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(one.teacher.ids, other.teacher.ids)
    assert counts == {"requests": 2, "incomplete": 0}


def test_a_request_with_a_missing_chunk_or_end_is_skipped_and_counted(log: DeltaLog) -> None:
    verify_steps, counts = conversation(TOKENS, 4), Counter[str]()
    commit(log, record_of("gap", verify_steps[:2], 0, last=False), record_of("gap", verify_steps[3:], 1, chunk=2))
    commit(log, record_of("running", verify_steps[:2], 2, last=False))
    commit(log, record_of("headless", verify_steps[1:], 3, chunk=1))
    assert asked(log, counts) == []
    assert counts == {"incomplete": 3}


def test_missing_features_are_recomputed_and_repeated_context_is_skipped(log: DeltaLog) -> None:
    verify_steps, counts = conversation(TOKENS, 4), Counter[str]()
    commit(
        log,
        record_of("r", verify_steps[:2], 0, features="recompute", last=False),
        record_of("r", verify_steps[2:], 1, chunk=1, features="recompute", before=range(6)),
    )
    (one,) = asked(log, counts)
    assert one.tokens_N.tolist() == list(TOKENS)
    assert torch.equal(one.features_NF, states(one.tokens_N[:-1]))
    assert (one.prompt, len(one.teacher.ids), counts["recomputed"]) == (4, 9, 1)


def test_requests_are_filtered_by_time_target_and_table_version(log: DeltaLog) -> None:
    verify_steps, second = conversation(TOKENS, 4), timedelta(seconds=1)
    commit(log, record_of("first", verify_steps, 0))
    version = log.version("accepted")
    commit(log, record_of("second", verify_steps, 1), record_of("foreign", verify_steps, 2, target="u" * 32, line=LINE))

    def names(wanted: RequestFilter, accepted: int | None = None) -> list[str]:
        return [past.request for past in asked(log, Counter(), wanted, accepted)]

    assert names(RequestFilter(TARGET)) == ["first", "second"]
    assert names(RequestFilter(TARGET), version) == ["first"]
    assert names(RequestFilter(TARGET, begin=TIME, end=TIME + second)) == ["first", "second"]
    assert names(RequestFilter(TARGET, end=TIME)) == names(RequestFilter(TARGET, begin=TIME + second)) == []
    assert names(RequestFilter(TARGET, label="sql")) == []


def test_trace_files_are_imported_once(log: DeltaLog, tmp_path: Path) -> None:
    folder = tmp_path / "recorded"
    folder.mkdir()
    names = [f"r{i}" for i in range(3)]
    for i, name in enumerate(names):
        (folder / f"{name}.trace").write_bytes(record_of(name, conversation(TOKENS, 4), i).value or b"")
    environ = to_environ(Settings(tables=Tables(uri=str(tmp_path))))
    result = CliRunner().invoke(app, ["replay", "import", str(folder)], env=environ)
    assert (result.exit_code, "no order.json" in result.output) == (2, True)
    (folder / "order.json").write_text(json.dumps({"segments": [names[:2], names[2:]]}))
    for _ in range(2):
        result = CliRunner().invoke(app, ["replay", "import", str(folder)], env=environ)
        assert result.exit_code == 0, result.output
    assert [past.request for past in asked(log, Counter())] == names
    assert log.read("accepted")["topic"].to_pylist() == ["recorded"] * 3
    (folder / "r3.trace").write_bytes(b"not a trace, but long enough")
    (folder / "order.json").write_text(json.dumps({"segments": [[*names, "r3"]]}))
    result = CliRunner().invoke(app, ["replay", "import", str(folder)], env=environ)
    assert (result.exit_code, "r3.trace: " in result.output) == (2, True)
