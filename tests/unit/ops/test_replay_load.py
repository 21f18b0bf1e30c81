"""Recorded requests are sent again as they came: their tokens, settings and times; and what came of it is told."""

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
from ops.loadgen.arrivals import Arrival, arrivals
from ops.loadgen.replay_load import Outcome, Plan, Sent, send
from pipeline.delta import DeltaLog
from schemas.settings import Settings, Tables, to_environ


def arrival(number: int, at: float, label: str | None = None) -> Arrival:
    return Arrival(f"r{number}", at, label, (65, 66, 67), 4, 0.0, 1.0, 0, None)


def silent(_: str) -> None:
    """Nobody listens."""


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
    return CliRunner().invoke(app, ["replay", "serve", *arguments], env=to_environ(settings))


def test_an_arrival_is_the_recorded_prompt_with_the_length_of_its_answer(settings: Settings) -> None:
    found = arrivals(DeltaLog(settings.tables))
    assert [one.request for one in found] == ["r0", "r1", "r2"], "a request without its prompt is left out"
    assert (found[0].prompt, found[0].answer_tokens) == ((65, 66, 67, 68), 9)
    assert found[0].at == pytest.approx(1_700_000_000, abs=1e-3)
    assert found[0].body("m")["ignore_eos"] is True


def test_the_node_gets_token_ids_and_is_asked_not_to_trace(settings: Settings) -> None:
    with running_node() as node:
        told = replay(settings, "--url", node.url, "--max", "--json", "--first", "2")
        assert told.exit_code == 0, told.output
        assert [r.prompt for r in node.engine.requests] == [(65, 66, 67, 68)] * 2
        assert {(r.max_tokens, r.ignore_eos, r.trace, r.temperature) for r in node.engine.requests} == {
            (9, True, False, 0.0)
        }
        replay(settings, "--url", node.url, "--max", "--trace")
        assert node.engine.requests[-1].trace
    found = json.loads(told.stdout)
    assert (found["requests"], found["answered"], found["failed"]) == (2, 2, 0)
    assert found["late_ms"] is None
    assert found["ttft_ms"]["p50"] > 0


def test_requests_are_sent_when_they_are_due_at_the_scaled_pace() -> None:
    with running_node() as node:
        outcome = send(Plan(node.url, speed=10.0), [arrival(i, 100.0 + i, f"l{i}") for i in range(4)], silent)
        assert sorted(r.label or "" for r in node.engine.requests) == ["l0", "l1", "l2", "l3"]
    begun = [one.begun for one in outcome.sent]
    assert 0.3 <= begun[-1] - begun[0] < 3
    assert all(one.due is not None and one.begun >= one.due for one in outcome.sent)
    assert len(outcome.answered) == 4


def test_failures_are_counted_by_their_reason_and_end_the_command_with_1(settings: Settings) -> None:
    engine = EchoEngine()
    engine.full = True
    with running_node(engine=engine) as node:
        told = replay(settings, "--url", node.url, "--max", "--json")
    found = json.loads(told.stdout)
    assert (told.exit_code, found["failed"], found["answered"]) == (1, 3, 0)
    assert all(why.startswith("429: ") for why in found["failures"])


def test_without_a_node_there_is_one_line_that_names_the_flag(settings: Settings) -> None:
    told = replay(settings, "--url", "http://127.0.0.1:9")
    assert told.exit_code == 2
    assert "--url http://127.0.0.1:9: no node" in told.output


def test_ctrl_c_hangs_up_and_still_tells_what_there_is(settings: Settings) -> None:
    with running_node() as node:
        node.engine.gate.clear()
        sending = threading.Thread(target=lambda: _interrupt_when(lambda: len(node.engine.requests) == 3))
        sending.start()
        told = replay(settings, "--url", node.url, "--max", "--json")
        sending.join()
        eventually(lambda: len(node.engine.ended) == 3)
    found: dict[str, Any] = json.loads(told.stdout)
    assert (found["cut_short"], found["sent"], found["answered"], found["failed"]) == (True, 3, 0, 0)


def _interrupt_when(holds: Any) -> None:
    eventually(holds)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)


def test_percentiles_are_over_answered_requests_and_lateness_over_all_that_were_sent() -> None:
    good = Sent(due=0.0, begun=0.5, pieces=[1.0, 1.25, 1.5], ended=2.0, tokens=6)
    bad = Sent(due=0.0, begun=0.25, pieces=[9.0], error="429: full")
    told = Outcome(3, [good, bad], seconds=2.0).summary()
    assert (told["ttft_ms"]["p50"], told["itl_ms"]["p99"], told["late_ms"]["most"]) == (500, 250, 500)
    assert (told["output_tokens_per_s"], told["failures"]) == (3, {"429: full": 1})
