"""A cancelled request ends before its next verify step: while it waits, inside its prompt, and while it decodes."""

from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import pytest
from tiny_target import VOCABULARY, write_tiny_target

from schemas.settings import load
from schemas.trace.record import VerifyStep
from serving.engines.base import Finish, Output, Request
from serving.engines.builtin.engine import BuiltinEngine
from serving.engines.builtin.scheduler import MAX_PREFILL_TOKENS


class Steps:
    """A trace sink that keeps all verify steps and then calls ``after``."""

    def __init__(self) -> None:
        self.verify_steps: list[VerifyStep] = []
        self.finish: Finish | None = None
        self.after: Callable[[Request], None] = lambda _: None

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        self.verify_steps += verify_steps
        self.finish = finish
        self.after(request)


def create_engine(folder: Path, sink: Steps | None = None, **flags: object) -> BuiltinEngine:
    ours = {
        "target.path": str(write_tiny_target(folder)),
        "speculator.draft_vocab_size": VOCABULARY,
        "serve.max_model_len": 240,
        "serve.adaptive_drafting": False,
    }
    return BuiltinEngine(load(environ={}, flags=ours | {name.replace("__", "."): v for name, v in flags.items()}), sink)


def collect(outputs: SimpleQueue[Output]) -> tuple[list[Output], Finish]:
    taken = [outputs.get(timeout=60)]
    while taken[-1].finish is None:
        taken.append(outputs.get(timeout=60))
    assert taken[-1].finish is not None
    return taken, taken[-1].finish


def test_a_waiting_request_is_cancelled_before_it_has_a_slot(tmp_path: Path) -> None:
    engine = create_engine(tmp_path, serve__max_num_seqs=1)
    running: SimpleQueue[Output] = SimpleQueue()
    waiting: SimpleQueue[Output] = SimpleQueue()
    after: SimpleQueue[Output] = SimpleQueue()
    in_slot: list[int] = []

    def take(output: Output) -> None:
        if running.empty():
            engine.cancel("waiting")
        in_slot.append(engine.health().requests_waiting)
        running.put(output)

    engine.submit(Request("running", (3, 14), 20, ignore_eos=True), take)
    engine.submit(Request("waiting", (5, 6, 7), 20, ignore_eos=True), waiting.put)
    engine.submit(Request("after", (8, 9), 3, ignore_eos=True), after.put)
    engine.start()
    (cancelled,), finish = collect(waiting)
    assert (cancelled.tokens, finish) == ((), "cancelled")
    assert cancelled.stats is not None
    assert cancelled.stats.verify_steps == 0
    for outputs, length in ((running, 20), (after, 3)):
        taken, finish = collect(outputs)
        assert (sum(len(output.tokens) for output in taken), finish) == (length, "length")
    engine.stop()
    assert in_slot[:2] == [2, 1], "the place in the queue is free at once"


def test_a_request_is_cancelled_inside_its_prompt(tmp_path: Path) -> None:
    steps = Steps()
    engine = create_engine(tmp_path, steps)
    steps.after = lambda request: engine.cancel(request.id)
    outputs: SimpleQueue[Output] = SimpleQueue()
    prompt = tuple(1 + i % (VOCABULARY - 1) for i in range(MAX_PREFILL_TOKENS + 30))
    engine.submit(Request("prompt", prompt, 20, ignore_eos=True), outputs.put)
    engine.start()
    (cancelled,), finish = collect(outputs)
    assert (cancelled.tokens, finish, steps.finish) == ((), "cancelled", "cancelled")
    assert [len(step.tokens) for step in steps.verify_steps] == [MAX_PREFILL_TOKENS]
    assert engine.health().requests_running == 0
    engine.stop()


@pytest.mark.parametrize(
    "flags",
    [
        {"serve__drafter": "eagle"},
        {"serve__drafter": "eagle", "serve__draft_tree_width": 3},
        {"serve__drafter": "suffix"},
        {"serve__draft_tree_width": 3},
    ],
    ids=["chain", "tree", "suffix", "hybrid tree"],
)
def test_a_decoding_request_is_cancelled_before_its_next_verify_step(tmp_path: Path, flags: dict[str, object]) -> None:
    """The prompt repeats itself, so that every drafter drafts from the first verify step on."""
    steps = Steps()
    engine = create_engine(tmp_path, steps, serve__max_num_seqs=1, **flags)
    outputs: SimpleQueue[Output] = SimpleQueue()
    follower: SimpleQueue[Output] = SimpleQueue()

    def cancel_inside(request: Request) -> None:
        if request.id == "decoding" and len([step for step in steps.verify_steps if step.draft_tokens]) == 1:
            engine.cancel(request.id)

    steps.after = cancel_inside
    engine.submit(Request("decoding", (3, 14, 15) * 20, 100, ignore_eos=True, temperature=1.0, seed=3), outputs.put)
    engine.submit(Request("follower", (8, 9), 3, ignore_eos=True, trace=False), follower.put)
    engine.start()
    taken, finish = collect(outputs)
    assert (finish, steps.finish) == ("cancelled", "cancelled")
    assert sum(bool(step.draft_tokens) for step in steps.verify_steps) == 1
    output = [token for one in taken for token in one.tokens]
    assert output[-1] == steps.verify_steps[-1].bonus, "output of the last verify step is sent"
    stats = taken[-1].stats
    assert stats is not None
    assert stats.verify_steps == sum(step.verify_step > 0 for step in steps.verify_steps)
    assert stats.draft_tokens > 0
    assert collect(follower)[1] == "length", "its slot is free"
    engine.stop()


def test_an_unknown_id_cancels_no_later_request(tmp_path: Path) -> None:
    engine = create_engine(tmp_path)
    outputs: SimpleQueue[Output] = SimpleQueue()
    engine.start()
    engine.cancel("later")
    engine.submit(Request("first", (3,), 2, ignore_eos=True), outputs.put)
    assert collect(outputs)[1] == "length"
    engine.submit(Request("later", (3,), 2, ignore_eos=True), outputs.put)
    assert collect(outputs)[1] == "length"
    engine.stop()
