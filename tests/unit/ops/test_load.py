"""Load generator: prompts, arrivals, request options and responses."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, repeat

import pytest

from ops.demo.scenario import alternate
from ops.loadgen.load import Load, Prompt, chat_request, parse_event, read_response

REQUEST = chat_request("model", Prompt("math", "1 + 1?"), 8)


def chunk(text: str) -> dict[str, object]:
    return {"id": "c1", "choices": [{"delta": {"content": text}}]}


LAST = {
    "id": "c1",
    "choices": [],
    "usage": {"prompt_tokens": 9, "completion_tokens": 4},
    "aurora": {
        "verify_steps": 3,
        "draft_tokens": 9,
        "accepted_tokens": 2,
        "suffix_accepted_tokens": 1,
        "speculators": ["day-0-head-0", "1"],
    },
}


def test_prompts_alternate_to_the_second_domain_after_the_switch() -> None:
    switched: list[bool] = []
    one, two = Prompt("math", "a"), Prompt("code", "b")
    source = alternate(repeat(one), repeat(two), lambda: bool(switched))
    assert list(islice(source, 3)) == [one, one, one]
    switched.append(True)
    assert list(islice(source, 2)) == [two, two]


def test_a_response_is_assembled_from_its_chunks() -> None:
    response = read_response(REQUEST, 1.0, 2.0, [chunk("it "), chunk("is 2"), LAST])
    assert (response.id, response.text, response.prompt, response.error) == ("c1", "it is 2", "1 + 1?", None)
    assert (response.verify_steps, response.draft_tokens, response.output_tokens) == (3, 9, 4)
    assert (response.accepted_tokens, response.suffix_accepted_tokens) == (2, 1)
    assert response.speculators == ("day-0-head-0", "1")


def test_a_truncated_stream_and_a_stream_with_an_error_are_failures() -> None:
    assert "before the chunk with usage" in (read_response(REQUEST, 1.0, 2.0, [chunk("it ")]).error or "")
    assert "before the chunk with usage" in (read_response(REQUEST, 1.0, 2.0, []).error or "")
    assert read_response(REQUEST, 1.0, 2.0, [chunk("it "), {"error": {"message": "stopped"}}]).error == "stopped"


def test_only_data_lines_are_events() -> None:
    assert parse_event('data: {"a": 1}') == {"a": 1}
    assert parse_event("data: [DONE]") is None
    assert parse_event("") is None
    assert parse_event(": ping") is None


class Node(ThreadingHTTPServer):
    """Stand-in for a serving node: answers with a delay when allowed, and keeps the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.running = 0
        self.max_running = 0
        self.received: list[tuple[dict[str, object], dict[str, str]]] = []
        self.status = 200
        self.may_answer = threading.Event()
        self.may_answer.set()


class Handler(BaseHTTPRequestHandler):
    server: Node

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.running += 1
            self.server.max_running = max(self.server.max_running, self.server.running)
            self.server.received.append((body, {k.lower(): v for k, v in self.headers.items()}))
        time.sleep(0.05)
        self.server.may_answer.wait()
        with self.server.lock:
            self.server.running -= 1
        answer = f"data: {json.dumps(chunk('2'))}\n\ndata: {json.dumps(LAST)}\n\ndata: [DONE]\n\n".encode()
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def node() -> Iterator[Node]:
    with Node() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def finished(load: Load) -> Load:
    load.start()
    deadline = time.monotonic() + 30
    while load.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not load.running
    return load


def load_of(node: Node, count: int, **changes: bool) -> Load:
    url = f"http://127.0.0.1:{node.server_address[1]}"
    asked = [Prompt("math", str(n)) for n in range(count)]
    return Load(url, [chat_request("model", prompt, 8, **changes) for prompt in asked], concurrency=3)


def test_a_closed_load_sends_every_prompt_once_at_constant_concurrency(node: Node) -> None:
    load = finished(load_of(node, 12))
    assert sorted(int(response.prompt) for response in load.responses) == list(range(12))
    assert not load.errors
    assert node.max_running == 3


def test_chat_requests_are_greedy_streamed_and_labelled(node: Node) -> None:
    finished(load_of(node, 1))
    body, headers = node.received[0]
    assert (body["temperature"], body["stream"], body["max_tokens"]) == (0, True, 8)
    assert headers["x-aurora-label"] == "math"
    assert "x-aurora-speculate" not in headers
    assert "x-aurora-trace" not in headers


def test_a_request_can_disable_speculation(node: Node) -> None:
    finished(load_of(node, 1, speculate=False))
    assert node.received[0][1]["x-aurora-speculate"] == "off"


def test_a_request_can_disable_tracing(node: Node) -> None:
    load = load_of(node, 2, trace=False)
    load.start()
    load.wait()
    assert [headers["x-aurora-trace"] for _, headers in node.received] == ["off", "off"]
    assert len(load.responses) == 2


def test_an_error_status_is_a_failure_with_a_reason(node: Node) -> None:
    node.status = 503
    load = finished(load_of(node, 1))
    assert load.errors[0].startswith("503")


def test_a_stopped_load_finishes_the_running_requests(node: Node) -> None:
    load = load_of(node, 1000)
    load.start()
    time.sleep(0.2)
    load.stop()
    deadline = time.monotonic() + 10
    while load.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not load.running
    assert 3 <= len(load.responses) == len(node.received) < 1000


def test_abandoned_requests_neither_complete_nor_fail(node: Node) -> None:
    node.may_answer.clear()
    load = load_of(node, 1000)
    load.start()
    deadline = time.monotonic() + 30
    while node.running < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    load.abandon()
    node.may_answer.set()
    assert not load.running
    assert load.responses == []
    assert len(node.received) == 3
    load.abandon()


def test_a_client_can_disconnect_early(node: Node) -> None:
    url = f"http://127.0.0.1:{node.server_address[1]}"
    asked = [chat_request("model", Prompt("math", str(n)), 8, disconnect_after=1 - n) for n in range(2)]
    load = finished(Load(url, asked, concurrency=1))
    assert (load.sent, load.disconnected, load.errors) == (2, 1, [])
    assert [response.prompt for response in load.responses] == ["1"]
