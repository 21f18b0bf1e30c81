"""A draining node answers running requests, rejects new ones, and stops when none is left or the drain times out.

Before that it is not ready and still accepts requests, for a delay.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from api_node import MODEL, Node, eventually, running_node

from schemas.settings import Serve
from schemas.status import ServeStatus
from serving.http.server import Drain


@pytest.fixture
def node() -> Iterator[Node]:
    with running_node(Serve(drain_timeout=60)) as node:
        yield node


def start_stream(node: Node, **options: Any) -> Iterator[Any]:
    """Return a stream that waits after its first tokens."""
    node.engine.gate.clear()
    stream: Iterator[Any] = iter(node.ask("a long answer", stream=True, **options))
    for chunk in stream:
        if chunk.choices[0].delta.content:
            return stream
    raise AssertionError


def drain(node: Node) -> None:
    node.server.handle_exit(signal.SIGTERM, None)


def test_running_requests_are_answered_before_the_server_stops(node: Node) -> None:
    stream = start_stream(node)
    drain(node)
    assert httpx.get(f"{node.url}/ready").status_code == 503
    node.engine.gate.set()
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "stop"
    eventually(lambda: not _listens(node))


def test_a_draining_node_is_healthy_but_not_ready_and_rejects_requests(node: Node) -> None:
    stream = start_stream(node)
    drain(node)
    assert httpx.get(f"{node.url}/health").status_code == 200
    ready = httpx.get(f"{node.url}/ready")
    assert (ready.status_code, ready.json()["draining"]) == (503, True)
    assert ServeStatus.model_validate(httpx.get(f"{node.url}/status").json()).draining
    for request in (lambda: node.ask("hello"), lambda: node.complete("hello"), node.client.models.list):
        with pytest.raises(openai.InternalServerError) as raised:
            request()
        assert (raised.value.status_code, raised.value.code) == (503, "node_draining")
        assert raised.value.response.headers["connection"] == "close"
    assert len(node.engine.requests) == 1
    node.engine.gate.set()
    assert list(stream)[-1].choices[0].finish_reason == "stop"


def test_a_failed_engine_stops_the_server_after_its_requests_got_the_error(node: Node) -> None:
    stream = start_stream(node)
    node.engine.error = node.engine.dies_with = "it broke"
    node.engine.gate.set()
    with pytest.raises(openai.APIError, match="it broke"):
        list(stream)
    eventually(lambda: not _listens(node))


def test_a_node_without_requests_stops_at_once(node: Node) -> None:
    drain(node)
    eventually(lambda: not _listens(node))


def test_an_idle_node_is_not_ready_and_accepts_requests_until_the_delay_is_over() -> None:
    with running_node(Serve(drain_delay=60)) as node:
        drain(node)
        assert httpx.get(f"{node.url}/ready").status_code == 503
        assert httpx.get(f"{node.url}/health").status_code == 200
        raw = node.client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": "hello"}]
        )
        assert raw.parse().choices[0].message.content == "hello"
        assert raw.headers["connection"] == "close"
        stream = start_stream(node)
        node.drain.delay = 0
        with pytest.raises(openai.InternalServerError):
            node.ask("hello")
        node.engine.gate.set()
        assert list(stream)[-1].choices[0].finish_reason == "stop"
        eventually(lambda: not _listens(node))


def test_a_second_signal_ends_the_delay() -> None:
    with running_node(Serve(drain_delay=60)) as node:
        drain(node)
        drain(node)
        eventually(lambda: not _listens(node))


def test_the_drain_times_out_after_the_delay() -> None:
    state = Drain(delay=3)
    assert not state.is_draining
    state.start()
    assert state.started_at is not None
    for age, is_closed, has_timed_out in ((2.9, False, False), (3.1, True, False), (8.1, True, True)):
        state.started_at = time.monotonic() - age
        assert (state.is_draining, state.is_closed, state.has_lasted(3 + 5)) == (True, is_closed, has_timed_out)


def test_a_request_that_outlasts_the_drain_gets_an_error() -> None:
    with running_node(Serve(drain_timeout=0.3)) as node:
        stream = start_stream(node)
        drain(node)
        with pytest.raises(openai.APIError, match="stopped before the answer was complete"):
            list(stream)
        eventually(lambda: not _listens(node))


def test_a_second_signal_stops_the_server_at_once(node: Node) -> None:
    stream = start_stream(node)
    drain(node)
    drain(node)
    eventually(lambda: not _listens(node))
    node.engine.gate.set()
    list(stream)


def _listens(node: Node) -> bool:
    try:
        httpx.get(f"{node.url}/health")
    except httpx.TransportError:
        return False
    return True
