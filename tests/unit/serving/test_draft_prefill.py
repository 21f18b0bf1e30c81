"""The speculator reads a long prompt in pieces next to running answers, and drafts as if it had read it at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_outputs import Recorder, collect, submit
from tiny_target import VOCABULARY, write_tiny_target

from schemas.settings import load
from serving.engines.base import Request
from serving.engines.builtin.engine import BuiltinEngine

PIECE = 20
LONG = tuple(1 + i * i % (VOCABULARY - 1) for i in range(150))


@pytest.fixture(params=[1, 3], ids=["chain", "tree"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BuiltinEngine]:
    flags = {
        "target.path": str(write_tiny_target(tmp_path)),
        "speculator.draft_vocab_size": VOCABULARY,
        "serve.drafter": "eagle",
        "serve.adaptive_drafting": False,
        "serve.draft_tree_width": request.param,
        "serve.draft_tree_nodes": 64,
        "serve.num_speculative_tokens": 4,
        "serve.max_model_len": 256,
    }
    engine = BuiltinEngine(load(environ={}, flags=flags), Recorder())
    engine.start()
    yield engine
    engine.stop()


def drafts_of(engine: BuiltinEngine, request: Request) -> tuple[list[int], dict[int, tuple[int, ...]]]:
    """Return the output of a request next to a running one, and its draft tokens by position."""
    running = submit(engine, Request(f"beside {request.id}", (3, 7), 200, ignore_eos=True))
    first = running.get(timeout=60)
    output, _ = collect(submit(engine, request))
    collect(running, [first])
    assert isinstance(engine._sink, Recorder)
    steps = engine._sink.verify_steps[request.id]
    return output, {step.position: step.draft_tokens for step in steps if step.verify_step}


def test_a_prompt_that_is_read_in_pieces_is_drafted_from_as_one_that_was_read_at_once(
    engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    speculator = engine._drafter.speculator
    assert speculator is not None
    read, reads = speculator.read, list[int]()
    monkeypatch.setattr(speculator, "read", lambda seq, count: (reads.append(count), read(seq, count)))
    whole, at_once = drafts_of(engine, Request("at once", LONG, 60, ignore_eos=True))
    assert reads == []
    assert all(at_once[position] for position in at_once if position < len(LONG) + 50)
    monkeypatch.setattr(engine._planner, "_limit_catch_up", lambda: PIECE)
    parts, in_pieces = drafts_of(engine, Request("in pieces", LONG, 60, ignore_eos=True))
    assert parts == whole
    # Each step meanwhile adds a token; the last tokens, as many as a verify step may commit, are read with the draft.
    assert reads == [PIECE] * ((len(LONG) - 65) // PIECE)
    undrafted = [position for position in in_pieces if not in_pieces[position] and position < len(LONG) + 50]
    assert len(undrafted) == len(reads), "it does not draft before it has read all"
    if speculator._width == 1:  # what a tree keeps depends on acceptance measured so far
        common = [position for position in in_pieces if in_pieces[position] and position in at_once]
        assert len(common) > 10
        # Rounding decides between equally likely tokens.
        assert sum(in_pieces[position] == at_once[position] for position in common) > 0.8 * len(common)
