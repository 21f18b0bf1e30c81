"""Comparisons on a node: in which order it is asked, what is pinned for it, and what comes of the answers."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ops.bench.loop_arms import Arm, Node, Plan, compare, of_trial, same_answers
from ops.loadgen.load import Prompt, Response
from schemas.errors import UserError
from schemas.settings import load

NONE = Arm(speculate=False)
PROMPTS = [Prompt("math", str(number)) for number in range(5)]


class Asked(ThreadingHTTPServer):
    """Stands for a serving node: answers at once, and keeps in order what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.told: list[str] = []
        self.pinned = "0"
        self.status = 200


class Handler(BaseHTTPRequestHandler):
    server: Asked

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.startswith("/admin"):
            self.server.pinned = body.get("version", "")
            self.server.told.append(f"{self.path.rsplit('/', 1)[1]} {self.server.pinned}".strip())
            self.answer(json.dumps({"authorized": self.headers["authorization"]}))
            return
        plain = self.headers["x-aurora-speculate"] == "off"
        asked = body["messages"][0]["content"]
        self.server.told.append(f"{'plain' if plain else self.server.pinned}: {asked}")
        figures = {"verify_steps": 4, "drafted": 8, "accepted": 0 if plain else int(self.server.pinned)}
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
def asked() -> Iterator[Asked]:
    with Asked() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def node(asked: Asked) -> Node:
    flags = {"serve.port": asked.server_address[1], "serve.admin_token": "secret"}
    return Node(load(environ={}, flags=flags), os.getpid(), max_tokens=8)


def test_a_version_is_pinned_and_warmed_up_when_it_changes_and_no_speculation_once(node: Node, asked: Asked) -> None:
    now, then = Arm(speculate=True, version="3"), Arm(speculate=True, version="1")
    arms = {"now": now, "then": then, "none": NONE}
    compare(node, arms, PROMPTS, Plan(at_once=1, trials=2, size=1))
    first = ["pin 3", "3: 4", "3: 0", "pin 1", "1: 4", "1: 0", "plain: 4", "plain: 0"]
    assert asked.told == [*first, "plain: 1", "1: 1", "pin 3", "3: 4", "3: 1"]


def test_what_is_served_is_compared_without_a_pin(node: Node, asked: Asked) -> None:
    compare(node, {"on": Arm(speculate=True), "off": NONE}, PROMPTS, Plan(at_once=1, trials=1, size=2))
    assert asked.told == ["0: 3", "0: 4", "0: 0", "0: 1", "plain: 3", "plain: 4", "plain: 0", "plain: 1"]


def test_accepted_per_steps_versions_and_answers_are_those_of_the_trials(node: Node) -> None:
    arms = {"now": Arm(speculate=True, version="3"), "none": NONE}
    measured = compare(node, arms, PROMPTS, Plan(at_once=1, trials=2, size=2))
    assert measured.accepted_per_steps == {"now": 0.75, "none": 0}
    assert measured.versions == {"now": ("3",), "none": ()}
    assert measured.same_answers == 0.75
    assert all(rate > 0 for rates in measured.rates.values() for rate in rates.clock.values)


def test_so_many_prompts_are_asked_at_once_and_all_are_answered(node: Node) -> None:
    answers = node.answer(PROMPTS, Plan(at_once=3, trials=1, size=5), speculate=True)
    assert sorted(answered.prompt for answered in answers) == list("01234")


def test_a_node_that_refuses_ends_the_measurement_with_its_reason(node: Node, asked: Asked) -> None:
    asked.status = 503
    with pytest.raises(UserError, match="1 of 1 requests failed: 503"):
        node.answer(PROMPTS[:1], Plan(1, 1, 1), speculate=True)
    with pytest.raises(UserError, match="pin 7: 503"):
        node.pin("7")


def test_prompts_come_verify_step_again_when_they_are_used_up() -> None:
    assert [prompt.text for prompt in of_trial(PROMPTS, 1, 3)] == ["3", "4", "0"]


def test_answers_are_the_same_where_all_arms_say_the_same() -> None:
    def said(prompt: str, text: str) -> Response:
        return Response("r", "math", 0, 1, prompt, text)

    one = [said("a", "x"), said("b", "y"), said("b", "y")]
    assert same_answers([one, [said("b", "z"), said("a", "x")]]) == 0.5
