"""Spans as log lines and as OTLP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from span_collector import collecting
from structlog.testing import capture_logs

from schemas.settings import Telemetry
from schemas.telemetry import spans
from schemas.telemetry.spans import Span
from schemas.telemetry.trace_context import TraceContext, new_trace

ROOT = Path(__file__).resolve().parents[3]


def test_a_span_has_the_same_ids_and_attributes_in_the_log_and_at_the_collector() -> None:
    context, link = new_trace(), new_trace()
    attributes = {"version": "7", "of": ["a"], "messaging.system": "kafka"}
    span = Span("swap version", "version_swapped", context, 10, 10.5, "00f067aa0ba902b7", "server", (link,), attributes)
    unsampled = TraceContext("1" * 32, "1" * 16, sampled=False)
    with collecting() as collector, capture_logs() as lines:
        spans.configure("test", Telemetry(endpoint=collector.url + "/", headers={"authorization": "Bearer x"}))
        spans.record(span)
        spans.record(Span("unwanted", "unwanted", unsampled, 0, 1))
        spans.close()
        spans.record(Span("after the end", "after_the_end", context, 0, 1))
    line = next(line for line in lines if line["event"] == "version_swapped")
    assert (line["trace_id"], line["span_id"]) == (context.trace_id, context.span_id)
    assert (line["duration_s"], line["links"], line["version"]) == (0.5, [link.trace_id], "7")
    assert [line["event"] for line in lines] == ["version_swapped", "unwanted"]
    (seen,) = collector.seen
    assert (seen.process, seen.name, seen.trace_id, seen.span_id) == (
        "aurora-test",
        "swap version",
        context.trace_id,
        context.span_id,
    )
    assert (seen.parent, seen.links, seen.failed) == ("00f067aa0ba902b7", {link.trace_id}, False)
    assert seen.attributes == {"aurora.version": "7", "aurora.of": ["a"], "messaging.system": "kafka"}
    assert collector.headers[0]["authorization"] == "Bearer x"


def test_a_failed_span_has_an_error_status_and_type() -> None:
    with collecting() as collector, capture_logs() as lines:
        spans.configure("test", Telemetry(endpoint=collector.url))
        spans.record(Span("send topic", "chunk_dropped", new_trace(), 0, 1, error_type="too_large"))
        spans.close()
    (seen,) = collector.seen
    assert (seen.failed, seen.attributes) == (True, {"error.type": "too_large"})
    assert [line["error.type"] for line in lines] == ["too_large"]


def test_without_an_endpoint_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys; from schemas.telemetry import spans; from schemas.telemetry.trace_context import new_trace;"
        "from schemas.settings import Telemetry; spans.configure('test', Telemetry());"
        "spans.record(spans.Span('x', 'x', new_trace(), 0, 1)); spans.close();"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
