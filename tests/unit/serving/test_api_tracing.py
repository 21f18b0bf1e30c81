"""What a node makes of a client's trace: ids of answers, and one span for each request however it ends."""

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
def told() -> Iterator[list[Any]]:
    """The lines that are told meanwhile."""
    with capture_logs() as lines:
        spans.configure("serve", Telemetry())
        yield lines
        spans.close()


def post(node: Node, header: str | None, **body: Any) -> httpx.Response:
    whole = {"model": MODEL, "prompt": "hello", "max_tokens": 8} | body
    return httpx.post(
        f"{node.url}/v1/completions", json=whole, headers={trace_context.HEADER: header} if header else {}
    )


def requests(lines: list[Any]) -> list[Any]:
    return [line for line in lines if line["event"] == "request"]


def test_requests_of_one_trace_are_spans_of_their_own(told: list[Any]) -> None:
    with running_node() as node:
        ids = [post(node, CLIENT.header()).json()["id"] for _ in range(2)]
    contexts = [trace_context.of_request(name) for name in ids]
    assert {context.trace for context in contexts} == {CLIENT.trace}
    assert len({CLIENT.span, *(context.span for context in contexts)}) == 3
    assert [(line["trace"], line["span"]) for line in requests(told)] == [(c.trace, c.span) for c in contexts]


@pytest.mark.parametrize("header", [None, "nonsense", CLIENT.header().replace("00-", "ff-", 1)])
def test_without_a_trace_of_the_client_one_begins(header: str | None) -> None:
    with running_node() as node:
        ids = [post(node, header).json()["id"] for _ in range(2)]
    traces = {trace_context.of_request(name).trace for name in ids}
    assert len(traces | {CLIENT.trace}) == 3


def test_several_choices_are_one_span(told: list[Any]) -> None:
    with running_node() as node:
        answer = post(node, CLIENT.header(), n=3).json()
        sequences = [request.id for request in node.engine.requests]
    (line,) = requests(told)
    assert (line["request"], line["choices"], line["trace"]) == (answer["id"], 3, CLIENT.trace)
    assert line["output_tokens"] == answer["usage"]["completion_tokens"]
    assert {trace_context.of_request(name).span for name in sequences} == {line["span"]}


def test_a_stream_is_told_when_it_has_ended(told: list[Any]) -> None:
    with running_node() as node:
        streamed = post(node, CLIENT.header(), stream=True).text
    (line,) = requests(told)
    assert line["request"] in streamed
    assert line["finish"]
    assert line["traced"]
