"""The load: which prompts, at what concurrency, and what counts as an answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import pytest

from ops.loadgen.traffic import Load, Prompt, changing, parse_event, read_answer

PROMPT = Prompt("math", "1 + 1?")


def chunk(text: str) -> dict[str, object]:
    return {"id": "c1", "choices": [{"delta": {"content": text}}]}


LAST = {
    "id": "c1",
    "choices": [],
    "usage": {"prompt_tokens": 9, "completion_tokens": 4},
    "aurora": {"verify_steps": 3, "drafted": 9, "accepted": 1, "speculators": ["day-0-head-0", "1"]},
}


def test_the_second_domain_begins_when_it_is_told_to() -> None:
    switched: list[bool] = []
    one, two = Prompt("math", "a"), Prompt("code", "b")
    source = changing([one], [two], lambda: bool(switched))
    assert list(islice(source, 3)) == [one, one, one]
    switched.append(True)
    assert list(islice(source, 2)) == [two, two]


def test_an_answer_is_put_together_from_its_chunks() -> None:
    answered = read_answer(PROMPT, 1.0, 2.0, [chunk("it "), chunk("is 2"), LAST])
    assert (answered.id, answered.text, answered.prompt, answered.error) == ("c1", "it is 2", "1 + 1?", None)
    assert (answered.verify_steps, answered.drafted, answered.accepted, answered.output_tokens) == (3, 9, 1, 4)
    assert answered.speculators == ("day-0-head-0", "1")


def test_a_stream_that_was_cut_or_that_carries_an_error_is_a_failure() -> None:
    assert "before the chunk with usage" in (read_answer(PROMPT, 1.0, 2.0, [chunk("it ")]).error or "")
    assert "before the chunk with usage" in (read_answer(PROMPT, 1.0, 2.0, []).error or "")
    assert read_answer(PROMPT, 1.0, 2.0, [chunk("it "), {"error": {"message": "stopped"}}]).error == "stopped"


def test_only_data_lines_are_events() -> None:
    assert parse_event('data: {"a": 1}') == {"a": 1}
    assert parse_event("data: [DONE]") is None
    assert parse_event("") is None
    assert parse_event(": ping") is None


class Node(ThreadingHTTPServer):
    """Stands for a serving node: answers after a moment, once it may, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.now = 0
        self.most = 0
        self.asked: list[tuple[dict[str, object], dict[str, str]]] = []
        self.status = 200
        self.may_answer = threading.Event()
        self.may_answer.set()


class Handler(BaseHTTPRequestHandler):
    server: Node

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            self.server.asked.append((body, {k.lower(): v for k, v in self.headers.items()}))
        time.sleep(0.05)
        self.server.may_answer.wait()
        with self.server.lock:
            self.server.now -= 1
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


def load_of(node: Node, count: int, **changes: object) -> Load:
    url = f"http://127.0.0.1:{node.server_address[1]}"
    source = iter([Prompt("math", str(n)) for n in range(count)])
    return Load(url, "model", source, concurrency=3, max_tokens=8, **changes)  # type: ignore[arg-type]


def test_every_prompt_is_sent_once_so_many_at_a_time(node: Node) -> None:
    load = finished(load_of(node, 12))
    assert sorted(int(answered.prompt) for answered in load.done) == list(range(12))
    assert all(answered.error is None for answered in load.done)
    assert node.most == 3


def test_requests_are_greedy_streamed_and_labelled(node: Node) -> None:
    finished(load_of(node, 1))
    body, headers = node.asked[0]
    assert (body["temperature"], body["stream"], body["max_tokens"]) == (0, True, 8)
    assert headers["x-aurora-label"] == "math"
    assert "x-aurora-speculate" not in headers
    assert "x-aurora-trace" not in headers


def test_the_comparison_asks_for_no_speculation(node: Node) -> None:
    finished(load_of(node, 1, speculate=False))
    assert node.asked[0][1]["x-aurora-speculate"] == "off"


def test_what_is_only_measured_is_not_traced(node: Node) -> None:
    load = load_of(node, 2, trace=False)
    load.start()
    load.wait()
    assert [headers["x-aurora-trace"] for _, headers in node.asked] == ["off", "off"]
    assert len(load.done) == 2


def test_a_refused_request_is_a_failure_that_says_why(node: Node) -> None:
    node.status = 503
    load = finished(load_of(node, 1))
    assert (load.done[0].error or "").startswith("503")


def test_a_load_that_is_stopped_ends_with_the_answers_that_run(node: Node) -> None:
    load = load_of(node, 1000)
    load.start()
    time.sleep(0.2)
    load.stop()
    deadline = time.monotonic() + 10
    while load.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not load.running
    assert 3 <= len(load.done) == len(node.asked) < 1000


def test_abandoned_requests_are_neither_answered_nor_failed(node: Node) -> None:
    node.may_answer.clear()
    load = load_of(node, 1000)
    load.start()
    deadline = time.monotonic() + 30
    while node.now < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    load.abandon()
    node.may_answer.set()
    assert not load.running
    assert load.done == []
    assert len(node.asked) == 3
    load.abandon()
