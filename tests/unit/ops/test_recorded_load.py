"""Recorded requests are sent again with their tokens, settings and arrival times, and summarized."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from api_node import eventually, running_node
from echo_engine import EchoEngine
from recorded import conversation, record_of, tables_of
from typer.testing import CliRunner, Result

from ops.cli.main import app
from ops.loadgen.load import Load, Response, read_model_name
from ops.loadgen.recorded import RecordedRequest, read_recorded, schedule_requests
from ops.loadgen.summary import summarize_load
from pipeline.delta import DeltaLog
from schemas.settings import Settings, Tables, to_environ


def recorded(number: int, at: float, label: str | None = None) -> RecordedRequest:
    return RecordedRequest(f"r{number}", at, label, (65, 66, 67), 4, 0.0, 1.0, 0, None)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(tables=Tables(uri=str(tmp_path / "tables")))
    log = DeltaLog(made.tables)
    log.create()
    verify_steps = conversation(range(65, 78), 4)
    rows = tables_of(
        *(record_of(f"r{i}", verify_steps, i) for i in range(3)), record_of("late", verify_steps[1:], 9, chunk=1)
    )
    log.append("traces", rows["traces"])
    return made


def replay(settings: Settings, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["replay", "load", *arguments], env=to_environ(settings))


def test_a_recorded_request_has_its_prompt_and_output_length(settings: Settings) -> None:
    found = read_recorded(DeltaLog(settings.tables))
    assert [one.id for one in found] == ["r0", "r1", "r2"], "a request without its prompt is skipped"
    assert (found[0].prompt, found[0].output_tokens) == ((65, 66, 67, 68), 9)
    assert found[0].arrival == pytest.approx(1_700_000_000, abs=1e-3)
    assert found[0].to_request("m", trace=False).body["ignore_eos"] is True


def test_a_replay_sends_token_ids_and_disables_tracing(settings: Settings) -> None:
    with running_node() as node:
        result = replay(settings, "--url", node.url, "--max", "--json", "--first", "2")
        assert result.exit_code == 0, result.output
        assert [r.prompt for r in node.engine.requests] == [(65, 66, 67, 68)] * 2
        assert {(r.max_tokens, r.ignore_eos, r.trace, r.temperature) for r in node.engine.requests} == {
            (9, True, False, 0.0)
        }
        replay(settings, "--url", node.url, "--max", "--trace")
        assert node.engine.requests[-1].trace
    found = json.loads(result.stdout)
    assert (found["requests"], found["succeeded"], found["failed"]) == (2, 2, 0)
    assert found["late_ms"] is None
    assert found["ttft_ms"]["p50"] > 0


def test_an_open_load_sends_requests_when_due_at_the_scaled_pace() -> None:
    with running_node() as node:
        arrivals = [recorded(i, 100.0 + i, f"l{i}") for i in range(4)]
        load = Load(
            node.url, schedule_requests(arrivals, read_model_name(node.url), speed=10.0, trace=False), concurrency=None
        )
        load.start()
        assert load.wait(60)
        assert sorted(r.label or "" for r in node.engine.requests) == ["l0", "l1", "l2", "l3"]
    started = sorted(one.started for one in load.responses)
    # The times are those of another clock than the one that waits.
    assert 0.29 < started[-1] - started[0] < 3
    assert all(late >= 0 for late in load.lateness_s)
    assert (len(load.responses), load.errors) == (4, [])


def test_failures_are_counted_by_reason_and_set_exit_code_1(settings: Settings) -> None:
    engine = EchoEngine()
    engine.full = True
    with running_node(engine=engine) as node:
        result = replay(settings, "--url", node.url, "--max", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["failed"], found["succeeded"]) == (1, 3, 0)
    assert all(why.startswith("429: ") for why in found["failures"])


def test_an_unreachable_node_is_an_error_that_names_the_option(settings: Settings) -> None:
    result = replay(settings, "--url", "http://127.0.0.1:9")
    assert result.exit_code == 2
    assert "--url http://127.0.0.1:9: no node" in result.output


def test_ctrl_c_abandons_running_requests_and_prints_the_summary(settings: Settings) -> None:
    with running_node() as node:
        node.engine.gate.clear()
        sending = threading.Thread(target=lambda: _interrupt_when(lambda: len(node.engine.requests) == 3))
        sending.start()
        result = replay(settings, "--url", node.url, "--max", "--json")
        sending.join()
        eventually(lambda: len(node.engine.ended) == 3)
    found: dict[str, Any] = json.loads(result.stdout)
    assert (found["cut_short"], found["sent"], found["succeeded"], found["failed"]) == (True, 3, 0, 0)
    assert result.exit_code == 130


def _interrupt_when(holds: Any) -> None:
    eventually(holds)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)


def test_percentiles_cover_succeeded_requests_and_lateness_all_sent_ones() -> None:
    good = Response("1", "", started=0.5, ended=2.0, output_tokens=6, text_times=(1.0, 1.25, 1.5))
    bad = Response("", "", started=0.25, ended=9.0, error="429: full", text_times=(9.0,))
    load = Load("", [], None, responses=[good, bad], sent=2, lateness_s=[0.5, 0.25], seconds=2.0)
    summary = summarize_load(load, 3)
    assert (summary["ttft_ms"]["p50"], summary["itl_ms"]["p99"], summary["late_ms"]["max"]) == (500, 250, 500)
    assert (summary["output_tokens_per_s"], summary["failures"]) == (3, {"429: full": 1})
