"""Trace contexts in headers, request ids and versions; spans as lines and as OTLP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from span_collector import collecting
from structlog.testing import capture_logs

from schemas.settings import Telemetry
from schemas.telemetry import spans, trace_context
from schemas.telemetry.spans import LINKS, Span
from schemas.telemetry.trace_context import TraceContext
from trainer.release.registration import TrainingLineage

ROOT = Path(__file__).resolve().parents[3]
HEADER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
hexes = st.text("0123456789abcdef", min_size=1)
contexts = st.builds(
    lambda trace, span, sampled: TraceContext(f"{trace:032x}", f"{span:016x}", sampled),
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.booleans(),
)


@given(contexts)
def test_a_header_says_what_was_written_into_it(context: TraceContext) -> None:
    assert trace_context.read(context.header()) == trace_context.read(context.header().encode()) == context


@given(contexts, st.sampled_from(["chatcmpl", "cmpl"]), st.none() | st.integers(0, 99))
def test_a_request_id_carries_its_span_also_for_one_of_several_choices(
    context: TraceContext, prefix: str, choice: int | None
) -> None:
    found = trace_context.of_request(context.request_id(prefix) + ("" if choice is None else f"-{choice}"))
    assert (found.trace, found.span) == (context.trace, context.span)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00",
        HEADER.upper(),
        HEADER.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
        HEADER.replace("00f067aa0ba902b7", "0" * 16),
        HEADER.replace("00-", "ff-", 1),
        HEADER + "-more",
        HEADER.replace("00-", "01-", 1) + "more",
    ],
)
def test_a_header_of_another_form_counts_as_none(header: str | None) -> None:
    assert trace_context.read(header) is None


def test_a_header_of_a_version_to_come_is_read_as_far_as_it_is_known() -> None:
    assert trace_context.read(HEADER.replace("00-", "01-", 1) + "-more") == trace_context.read(HEADER)


def test_ids_of_other_servers_and_versions_have_a_trace_of_their_own_and_always_the_same() -> None:
    named = [trace_context.of_request("rid-7"), trace_context.of_request("rid-8"), trace_context.of_version("a", "7")]
    assert len({one.trace for one in named}) == 3
    assert named == [
        trace_context.of_request("rid-7"),
        trace_context.of_request("rid-8"),
        trace_context.of_version("a", "7"),
    ]
    assert all(trace_context.read(one.header()) == one for one in named)


def test_a_span_is_told_as_a_line_and_to_the_collector_by_the_same_names() -> None:
    context, link = trace_context.begun(), trace_context.begun()
    span = Span("swap", context, 10, 10.5, "00f067aa0ba902b7", links=(link,), attributes={"version": "7", "of": ["a"]})
    with collecting() as collector, capture_logs() as lines:
        spans.configure("test", Telemetry(endpoint=collector.url + "/", headers={"authorization": "Bearer x"}))
        spans.record(span)
        spans.record(Span("unwanted", TraceContext("1" * 32, "1" * 16, sampled=False), 0, 1))
        spans.close()
        spans.record(Span("after the end", context, 0, 1))
    told = next(line for line in lines if line["event"] == "swap")
    assert (told["trace"], told["seconds"], told["links"], told["version"]) == (context.trace, 0.5, [link.trace], "7")
    assert [line["event"] for line in lines] == ["swap", "unwanted"]
    (seen,) = collector.seen
    assert (seen.process, seen.name, seen.trace, seen.span) == ("aurora-test", "swap", context.trace, context.span)
    assert (seen.parent, seen.links) == ("00f067aa0ba902b7", {link.trace})
    assert seen.attributes == {"aurora.version": "7", "aurora.of": ["a"]}
    assert collector.headers[0]["authorization"] == "Bearer x"


def test_without_an_endpoint_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys; from schemas.telemetry import spans, trace_context; from schemas.settings import Telemetry;"
        "spans.configure('test', Telemetry()); spans.record(spans.Span('x', trace_context.begun(), 0, 1));"
        "spans.close();"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_version_links_to_all_requests_it_was_trained_on() -> None:
    lineage, taught = TrainingLineage(), [trace_context.begun() for _ in range(LINKS + 1)]
    for step, context in enumerate(taught, start=1):
        lineage.add(step, [context.request_id("cmpl")] * 2)
    whole, *parts = lineage.close_version("line", "7", 200)
    assert (whole.context, whole.attributes["requests"]) == (trace_context.of_version("line", "7"), len(taught))
    assert [len(part.links) for part in parts] == [LINKS, 1]
    assert {link.trace for part in parts for link in part.links} == {context.trace for context in taught}
    assert all(part.context.trace == whole.context.trace and part.parent == whole.context.span for part in parts)
    assert [span.attributes["requests"] for span in lineage.close_version("line", "8", 201)] == [0]


def test_requests_of_rolled_back_steps_are_not_in_the_lineage() -> None:
    lineage = TrainingLineage()
    lineage.add(1, ["a"])
    lineage.add(2, ["a", "b"])
    lineage.roll_back(1)
    whole, part = lineage.close_version("line", "7", 3)
    assert whole.attributes["requests"] == 1
    assert part.links == (trace_context.of_request("a"),)
