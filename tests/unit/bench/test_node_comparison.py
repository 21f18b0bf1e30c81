"""Comparisons on a node: the order of the requests, the pinned versions, and the results."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ops.bench.loop.node_comparison import (
    ComparisonSize,
    NodeArm,
    ServingNode,
    compare_on_node,
    share_of_same_answers,
    trial_prompts,
)
from ops.loadgen.load import Prompt, Response
from schemas.errors import UserError
from schemas.settings import load

NONE = NodeArm(speculate=False)
PROMPTS = [Prompt("math", str(number)) for number in range(5)]


class FakeNode(ThreadingHTTPServer):
    """A serving node that responds at once and records the requests in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.received: list[str] = []
        self.labels: set[tuple[str | None, bool]] = set()
        """Label of each request, and whether it may speculate."""
        self.pinned = "0"
        self.status = 200


class Handler(BaseHTTPRequestHandler):
    server: FakeNode

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.startswith("/admin"):
            self.server.pinned = body.get("version", "")
            self.server.received.append(f"{self.path.rsplit('/', 1)[1]} {self.server.pinned}".strip())
            self.answer(json.dumps({"authorized": self.headers["authorization"]}))
            return
        plain = self.headers["x-aurora-speculate"] == "off"
        asked = body["messages"][0]["content"]
        self.server.labels.add((self.headers["x-aurora-label"], not plain))
        self.server.received.append(f"{'plain' if plain else self.server.pinned}: {asked}")
        figures = {"verify_steps": 4, "draft_tokens": 8, "accepted_tokens": 0 if plain else int(self.server.pinned)}
        last = {
            "id": "c1",
            "choices": [{"delta": {"content": f"to {asked}{'!' if plain and asked == '1' else ''}"}}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 4},
            "aurora": {**figures, "speculators": [] if plain else [self.server.pinned]},
        }
        self.answer(f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n")

    def answer(self, text: str) -> None:
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[FakeNode]:
    with FakeNode() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def node(fake: FakeNode) -> ServingNode:
    flags = {"serve.port": fake.server_address[1], "serve.admin_token": "secret"}
    return ServingNode(load(environ={}, flags=flags), os.getpid(), max_tokens=8)


def test_traced_requests_without_speculation_have_a_label_of_their_own(node: ServingNode, fake: FakeNode) -> None:
    arms = {"now": NodeArm(speculate=True), "none": NONE}
    compare_on_node(node, arms, PROMPTS, ComparisonSize(concurrency=1, trials=1, prompts=1))
    assert fake.labels == {("math", True), ("math", False)}
    fake.labels.clear()
    compare_on_node(node, arms, PROMPTS, ComparisonSize(concurrency=1, trials=1, prompts=1, trace=True))
    assert fake.labels == {("math", True), ("math-no-speculation", False)}


def test_each_changed_version_is_pinned_and_warmed_up(node: ServingNode, fake: FakeNode) -> None:
    now, then = NodeArm(speculate=True, version="3"), NodeArm(speculate=True, version="1")
    arms = {"now": now, "then": then, "none": NONE}
    compare_on_node(node, arms, PROMPTS, ComparisonSize(concurrency=1, trials=2, prompts=1))
    first = ["pin 3", "3: 4", "3: 0", "pin 1", "1: 4", "1: 0", "plain: 4", "plain: 0"]
    assert fake.received == [*first, "plain: 1", "1: 1", "pin 3", "3: 4", "3: 1"]


def test_the_active_version_is_compared_without_a_pin(node: ServingNode, fake: FakeNode) -> None:
    compare_on_node(
        node, {"on": NodeArm(speculate=True), "off": NONE}, PROMPTS, ComparisonSize(concurrency=1, trials=1, prompts=2)
    )
    assert fake.received == ["0: 3", "0: 4", "0: 0", "0: 1", "plain: 3", "plain: 4", "plain: 0", "plain: 1"]


def test_the_results_are_those_of_the_trials(node: ServingNode) -> None:
    arms = {"now": NodeArm(speculate=True, version="3"), "none": NONE}
    measured = compare_on_node(node, arms, PROMPTS, ComparisonSize(concurrency=1, trials=2, prompts=2))
    assert measured.accepted_per_step == {"now": 0.75, "none": 0}
    assert measured.versions == {"now": ("3",), "none": ()}
    assert measured.same_answers == 0.75
    assert all(rate > 0 for rates in measured.rates.values() for rate in rates.clock.values)


def test_all_prompts_are_answered_at_a_concurrency(node: ServingNode) -> None:
    answers = node.run_requests(PROMPTS, ComparisonSize(concurrency=3, trials=1, prompts=5), speculate=True)
    assert sorted(answered.prompt for answered in answers) == list("01234")


def test_a_rejected_request_ends_the_measurement_with_its_reason(node: ServingNode, fake: FakeNode) -> None:
    fake.status = 503
    with pytest.raises(UserError, match="1 of 1 requests failed: 503"):
        node.run_requests(PROMPTS[:1], ComparisonSize(1, 1, 1), speculate=True)
    with pytest.raises(UserError, match="pin 7: 503"):
        node.pin("7")


def test_prompts_repeat_when_they_are_used_up() -> None:
    assert [prompt.text for prompt in trial_prompts(PROMPTS, 1, 3)] == ["3", "4", "0"]


def test_the_share_of_same_answers_counts_each_prompt_once() -> None:
    def said(prompt: str, text: str) -> Response:
        return Response("r", "math", 0, 1, prompt, text)

    one = [said("a", "x"), said("b", "y"), said("b", "y")]
    assert share_of_same_answers([one, [said("b", "z"), said("a", "x")]]) == 0.5
