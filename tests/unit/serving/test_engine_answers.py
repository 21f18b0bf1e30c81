"""The engine hands its complete answers on, and learns those of other nodes between its verify steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from tiny_target import VOCABULARY, write_tiny_target

from schemas.answers import Answer
from schemas.settings import load
from serving.engines.base import Output, Request
from serving.engines.builtin.engine import BuiltinEngine

PROMPT = (3, 14, 15, 9)


class Sink:
    """Keeps the answers that it is to publish."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[int]] = {}

    def publish(self, request: Request, output: Sequence[int]) -> None:
        self.outputs[request.id] = list(output)


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def engine(tmp_path: Path, sink: Sink) -> Iterator[BuiltinEngine]:
    flags = {
        "target.path": str(write_tiny_target(tmp_path)),
        "speculator.draft_vocab_size": VOCABULARY,
        "serve.drafter": "suffix",
        "serve.suffix_scope": "fleet",
        "serve.adaptive_drafting": False,
        "serve.max_model_len": 200,
    }
    engine = BuiltinEngine(load(environ={}, flags=flags), answers=sink)
    engine.start()
    yield engine
    engine.stop()


def generate(
    engine: BuiltinEngine, name: str, max_tokens: int = 40, on_output: Callable[[], None] = lambda: None
) -> list[int]:
    outputs: SimpleQueue[Output] = SimpleQueue()
    tokens: list[int] = []
    engine.submit(Request(name, PROMPT, max_tokens, ignore_eos=True), outputs.put)
    while True:
        output = outputs.get(timeout=60)
        tokens += output.tokens
        on_output()
        if output.finish is not None:
            return tokens


def answers(tokens: Sequence[int], count: int = 1) -> list[Answer]:
    return [Answer("line", "other", str(n), None, n, 0, np.array(tokens, np.int32)) for n in range(count)]


def wait_until(holds: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(200):
        if holds():
            return
        waiting.wait(0.05)
    raise AssertionError("it did not happen within 10 s")


def test_complete_answers_are_handed_on(engine: BuiltinEngine, sink: Sink) -> None:
    tokens = generate(engine, "a")
    cancelled = generate(engine, "b", 190, on_output=lambda: engine.cancel("b"))
    wait_until(lambda: "a" in sink.outputs)
    assert 0 < len(cancelled) < 190
    generate(engine, "c", 1)
    wait_until(lambda: "c" in sink.outputs)
    assert sink.outputs["a"] == tokens
    assert "b" not in sink.outputs


def test_an_idle_engine_learns_at_once(engine: BuiltinEngine) -> None:
    engine.learn(answers(range(50), 100))
    wait_until(lambda: engine.corpus.num_tokens == 50 * 100)
