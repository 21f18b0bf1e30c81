"""Requests whose sampling parameters lie at their bounds and beyond, with the parameters that make each one invalid."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
from api_node import MODEL, Node, running_node
from tiny_target import VOCABULARY, write_tiny_target

from schemas.settings import load
from serving.engines.builtin.engine import BuiltinEngine

MAX_LEN = 96
"""``serve.max_model_len`` of the node."""
_INF, _NAN = float("inf"), float("nan")

VALID: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 0, -0.0, 5e-324, 1e-45, 1e-40, 1e-38, 9.9e-7, 1e-6, 1e-5, 1e-3, 1, 2),
    "top_p": (None, 5e-324, 1e-45, 1e-9, 0.5, math.nextafter(1, 0), 1),
    "top_k": (None, -1, 0, 1, 2, VOCABULARY - 1, VOCABULARY, VOCABULARY + 1, 2**31 - 1),
    "seed": (None, 0, -1, -(2**63), 2**63 - 1),
    "n": (None, 1, 2, 3),
    "max_tokens": (None, 0, 1, 2, 7, MAX_LEN - 1, MAX_LEN, 2**31, 10**30),
    "logprobs": (None, False, 0, 1, 20),
    "stop": (None, [], "a", ["b"] * 64, ["\u2028", "🙂"]),
    "stop_token_ids": (None, [], [0], [VOCABULARY - 1], [3] * 1000),
    "ignore_eos": (None, False, True),
    "echo": (None, False, True),
    "frequency_penalty": (None, 0, -0.0, -2, 2, 5e-324, 0.7),
    "presence_penalty": (None, 0, -2, 2, 1e-45),
    "repetition_penalty": (None, 1, 5e-324, 1e-45, 1e-9, 1.1, 1e9, 1e308),
    "min_p": (None, 0, -0.0, 5e-324, 1e-9, 0.5, 1),
    "min_tokens": (None, 0, 1),
    "logit_bias": (None, {}, {"5": None}, {"0": -100, "5": 100}, {str(VOCABULARY - 1): 5e-324}),
    "allowed_token_ids": (None, [0], [VOCABULARY - 1, 7], list(range(VOCABULARY))),
    "response_format": (None, {"type": "text"}, {"type": "text", "json_schema": None}),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "prompt": ([1], [VOCABULARY - 1], [0] * (MAX_LEN - 1), [[2], [3, 4]]),
}
"""Values by parameter of a text completion."""

INVALID: dict[str, tuple[Any, ...]] = {
    "temperature": (math.nextafter(2, 3), -5e-324, -1, 1e308, _INF, -_INF, _NAN, "hot", []),
    "top_p": (0, -0.0, -5e-324, math.nextafter(1, 2), _INF, _NAN, {}),
    "top_k": (-2, 2**31, 2**63, -(10**30), 1.5, _NAN, "few"),
    "seed": (2**63, -(2**63) - 1, 10**30, 0.5, [0]),
    "n": (0, -1, 33, 10**30, 1.5),
    "max_tokens": (-1, -(10**30), 0.5, _INF, "all"),
    "logprobs": (-1, 21, 10**30, 0.5),
    "stop": ("", [""], ["b"] * 65, 7, "\ud83d", [None]),
    "stop_token_ids": ([-1], [VOCABULARY], [10**30], ["a"], 3),
    "ignore_eos": ("perhaps", 2, []),
    "echo": ("perhaps", 2, []),
    "frequency_penalty": (math.nextafter(2, 3), -2.1, _NAN, _INF, "much"),
    "presence_penalty": (math.nextafter(-2, -3), 1e308, -_INF, []),
    "repetition_penalty": (0, -0.0, -1, _INF, _NAN, "some"),
    "min_p": (-5e-324, math.nextafter(1, 2), _NAN, {}),
    "min_tokens": (-1, 10**31, 0.5, "all"),
    "logit_bias": ({"5": 100.1}, {"5": _NAN}, {str(VOCABULARY): -100}, {"-1": 1}, {"a": 1}, {"5": []}, []),
    "allowed_token_ids": ([], [-1], [VOCABULARY], [10**30], [None], "a", {}),
    "response_format": ({"type": "xml"}, {"type": "json_schema"}, {}, [], "json_object"),
    "structured_outputs": ({"regex": "("}, {"choice": []}, {"json": "{"}, {"json": {"type": "strin"}}, {"what": 1}, 3),
    "guided_json": ({"type": "integer", "multipleOf": 999983}, {"type": "x"}, "{", "[]", [], 7),
    "guided_regex": ("(", "[", "a{9,1}", 5, []),
    "prompt": ([], "", None, [VOCABULARY], [-1], [10**30], [True], [0] * MAX_LEN, [[1], []], {}),
}
_GRAMMARS = {"response_format", "structured_outputs", "guided_json", "guided_regex"}


def random_request(random: Random) -> tuple[dict[str, Any], set[str]]:
    """Return the body of a text completion without its model, and the names of its invalid parameters."""
    names = {"prompt", "max_tokens", *random.sample(sorted(VALID), random.randint(0, 6))}
    # Half of the requests are valid.
    invalid = set(random.sample(sorted(names), random.choice((0, 0, 1, 2))))
    # Sorted: the order of a set of texts differs between processes.
    body = {name: random.choice((INVALID if name in invalid else VALID)[name]) for name in sorted(names)}
    if "max_tokens" not in invalid and body.get("min_tokens") == 1 and body["max_tokens"] == 0:
        invalid.add("min_tokens")
    if body.get("allowed_token_ids") is not None and invalid & _GRAMMARS:
        # Next to a grammar, valid or not, they are rejected.
        invalid.add("allowed_token_ids")
    return body, invalid


def check_answer(node: Node, body: dict[str, Any], invalid: set[str]) -> None:
    """Send a request; its answer is complete, or a rejection that names one of the invalid parameters."""
    # json.dumps also writes numbers that are no JSON, as careless clients do.
    content = json.dumps({"model": MODEL, **body})
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{node.url}/v1/completions", content=content, headers=headers, timeout=300)
    assert node.engine.health().alive
    if invalid:
        assert answer.status_code == 400, (body, answer.text)
        assert answer.json()["error"]["param"].split(".")[0] in invalid
        return
    assert answer.status_code == 200, (body, answer.text)
    choices = answer.json()["choices"]
    several = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
    assert len(choices) == len(several) * (body.get("n") or 1)
    assert {choice["finish_reason"] for choice in choices} <= {"stop", "length"}
    limit = 16 if body["max_tokens"] is None else body["max_tokens"]
    assert answer.json()["usage"]["completion_tokens"] <= limit * len(choices)


@contextmanager
def running_tiny_node(folder: Path, **flags: Any) -> Iterator[Node]:
    """Start a node with the built-in engine and a random target."""
    named = {name.replace("__", "."): value for name, value in flags.items()}
    ours = {
        "target.path": str(write_tiny_target(folder)),
        "speculator.draft_vocab_size": VOCABULARY,
        "serve.max_model_len": MAX_LEN,
        "serve.adaptive_drafting": False,
    }
    engine = BuiltinEngine(load(environ={}, flags=ours | named))
    engine.start()
    with running_node(engine=engine) as node:
        yield node
