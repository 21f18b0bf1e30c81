"""Log lines carry the trace that they belong to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from schemas.telemetry.logs import add_trace
from schemas.telemetry.trace_context import new_trace, request_context, version_context

ROOT = Path(__file__).resolve().parents[3]


def test_a_line_about_a_request_carries_its_trace_and_span() -> None:
    context = new_trace()
    line = add_trace(None, "info", {"event": "x", "request": context.to_request_id("cmpl")})
    assert (line["trace_id"], line["span_id"]) == (context.trace_id, context.span_id)
    assert add_trace(None, "info", {"request": "rid-7"})["trace_id"] == request_context("rid-7").trace_id


def test_a_line_about_a_version_carries_the_trace_of_the_version() -> None:
    line = add_trace(None, "info", {"event": "x", "line": "l", "version": "7"})
    assert line["trace_id"] == version_context("l", "7").trace_id


def test_a_line_keeps_its_own_trace_and_other_lines_get_none() -> None:
    own = {"event": "x", "trace_id": "a", "span_id": "b", "request": "rid-7"}
    assert add_trace(None, "info", dict(own)) == own
    for line in ({"event": "x"}, {"event": "x", "line": "l", "version": None}):
        assert add_trace(None, "info", dict(line)) == line


def test_every_logger_writes_json_lines_with_process_event_level_and_time() -> None:
    code = (
        "import logging, structlog; from schemas.telemetry import logs; logs.configure('test');"
        "structlog.get_logger().info('happened', request='rid-7'); logging.getLogger('other').warning('said')"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    ours, other = map(json.loads, run.stderr.splitlines())
    assert (ours["event"], ours["process"], ours["level"]) == ("happened", "test", "info")
    assert ours["trace_id"] == request_context("rid-7").trace_id
    assert (other["event"], other["logger"], other["process"]) == ("said", "other", "test")
    assert {"timestamp"} <= ours.keys() & other.keys()
