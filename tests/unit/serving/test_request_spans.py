"""Trace context of requests: ids of answers, and one span per request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_node import MODEL, Node, running_node
from structlog.testing import capture_logs

from schemas.settings import Telemetry
from schemas.telemetry import spans, trace_context
from schemas.telemetry.trace_context import TraceContext

CLIENT = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")


@pytest.fixture
def log_lines() -> Iterator[list[Any]]:
    """The log lines of the test."""
    with capture_logs() as lines:
        spans.configure("serve", Telemetry())
        yield lines
        spans.close()


def post(node: Node, header: str | None, **body: Any) -> httpx.Response:
    whole = {"model": MODEL, "prompt": "hello", "max_tokens": 8} | body
    return httpx.post(
        f"{node.url}/v1/completions", json=whole, headers={trace_context.TRACEPARENT: header} if header else {}
    )


def requests(lines: list[Any]) -> list[Any]:
    return [line for line in lines if line["event"] == "request_finished"]


def test_each_request_of_a_trace_has_its_own_span(log_lines: list[Any]) -> None:
    with running_node() as node:
        ids = [post(node, CLIENT.to_traceparent()).json()["id"] for _ in range(2)]
    contexts = [trace_context.request_context(name) for name in ids]
    assert {context.trace_id for context in contexts} == {CLIENT.trace_id}
    assert len({CLIENT.span_id, *(context.span_id for context in contexts)}) == 3
    assert [(line["trace_id"], line["span_id"]) for line in requests(log_lines)] == [
        (c.trace_id, c.span_id) for c in contexts
    ]


@pytest.mark.parametrize("header", [None, "nonsense", CLIENT.to_traceparent().replace("00-", "ff-", 1)])
def test_a_request_without_a_valid_traceparent_starts_a_trace(header: str | None) -> None:
    with running_node() as node:
        ids = [post(node, header).json()["id"] for _ in range(2)]
    traces = {trace_context.request_context(name).trace_id for name in ids}
    assert len(traces | {CLIENT.trace_id}) == 3


def test_several_choices_share_one_span(log_lines: list[Any]) -> None:
    with running_node() as node:
        answer = post(node, CLIENT.to_traceparent(), n=3).json()
        sequences = [request.id for request in node.engine.requests]
    (line,) = requests(log_lines)
    assert (line["gen_ai.response.id"], line["gen_ai.request.choice.count"], line["trace_id"]) == (
        answer["id"],
        3,
        CLIENT.trace_id,
    )
    assert line["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"]
    assert {trace_context.request_context(name).span_id for name in sequences} == {line["span_id"]}


def test_a_stream_records_its_span_when_it_ends(log_lines: list[Any]) -> None:
    with running_node() as node:
        streamed = post(node, CLIENT.to_traceparent(), stream=True).text
    (line,) = requests(log_lines)
    assert line["gen_ai.response.id"] in streamed
    assert line["gen_ai.response.finish_reasons"] == ["stop"]
    assert line["traced"]
