"""Every verify step names the version that served it, from the engine to the table, also where the version changes in
a request, and where nothing was drafted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue

from engine_outputs import Recorder, collect, submit
from tiny_target import VOCABULARY, write_tiny_target
from trace_bench import FakeProducer, eventually

from pipeline.batches import Record, build
from schemas.settings import Kafka, Traces, load
from schemas.speculator.network import random_draft
from schemas.trace.record import VerifyStep
from serving.engines.base import Finish, Output, Request
from serving.engines.builtin.engine import BuiltinEngine
from serving.traces.chunks import Origin
from serving.traces.publisher import TracePublisher

VERIFY_STEPS = 10
"""Verify steps between two changes of the version."""


class SlowSink:
    """Keeps verify steps, passes them on, and waits between two of them."""

    def __init__(self, to: TracePublisher) -> None:
        self.verify_steps: list[VerifyStep] = []
        self._to = to

    def record(self, request: Request, verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        self._to.record(request, verify_steps, finish)
        self.verify_steps.extend(verify_steps)
        time.sleep(0.002)

    def wait(self) -> None:
        seen = len(self.verify_steps)
        eventually(lambda: len(self.verify_steps) >= seen + VERIFY_STEPS)


def now_us() -> int:
    return time.time_ns() // 1000


def test_swap_during_a_request_changes_the_version_of_later_verify_steps_only(tmp_path: Path) -> None:
    flags = {
        "target.path": str(write_tiny_target(tmp_path)),
        "speculator.draft_vocab_size": VOCABULARY,
        "serve.max_model_len": 240,
        "serve.num_speculative_tokens": 2,
        "serve.adaptive_drafting": False,
    }
    producer = FakeProducer()
    publisher = TracePublisher(Kafka(max_message_bytes=30_000), Traces(), lambda *_: producer)
    sink = SlowSink(publisher)
    engine = BuiltinEngine(load(environ={}, flags=flags), sink)
    publisher.start(Origin("node-0", engine.target, engine.line, engine.vocabulary))
    engine.start()
    outputs: SimpleQueue[Output] = SimpleQueue()
    engine.submit(Request("r", (3, 4, 5), 230, ignore_eos=True), outputs.put)

    def change(how: Callable[[], object]) -> tuple[int, int]:
        sink.wait()
        before = now_us()
        how()
        return before, now_us()

    changes = [
        change(lambda: engine.swap(random_draft(engine._target.shape, 1), "1")),
        change(lambda: engine.speculate(on=False)),
        change(lambda: engine.swap(random_draft(engine._target.shape, 2), "2")),
        change(lambda: engine.speculate(on=True)),
    ]
    sink.wait()
    engine.stop()
    counts = publisher.close(10)
    decoded = [r for r in sink.verify_steps if r.verify_step > 0]
    assert [version for version, _ in groupby(r.speculator for r in decoded)] == ["day-0-head-0", "1", "", "2"]
    assert not any(r.speculator for r in sink.verify_steps if r.verify_step == 0)

    (swap_begun, swapped), (off_begun, _), _, (on_begun, _) = changes
    assert all(r.speculator == "day-0-head-0" for r in decoded if r.time_us < swap_begun)
    assert all(r.speculator == "1" for r in decoded if swapped < r.time_us < off_begun)
    since = {r.speculator: r.active_since_us for r in decoded}
    assert {(r.speculator, r.active_since_us) for r in decoded} == set(since.items()), "one time for each version"
    assert since[""] is None
    assert swap_begun <= (since["1"] or 0) <= swapped
    assert not [r for r in decoded if r.speculator == "2" and r.time_us < on_begun]

    assert (counts.captured, counts.dropped) == (counts.published, {})
    sent = zip(producer.values, producer.headers, strict=True)
    records = [Record("t", 0, offset, 0, b"r", value, tuple(headers)) for offset, (value, headers) in enumerate(sent)]
    assert len(records) > 1
    rows = build(records, 32).rows
    assert [(row["verify_step"], row["speculator"]) for row in rows["traces"].to_pylist()] == [
        (r.verify_step, r.speculator) for r in sink.verify_steps
    ]
    versions = {r.verify_step: r.speculator for r in sink.verify_steps}
    last_of = {row["offset"]: versions[row["verify_step"]] for row in rows["traces"].to_pylist() if row["speculator"]}
    assert {r["offset"]: r["speculator"] for r in rows["accepted"].to_pylist() if r["speculator"]} == last_of


def test_a_verify_step_without_a_draft_names_the_version_that_may_draft_for_its_request(tmp_path: Path) -> None:
    flags = {
        "target.path": str(write_tiny_target(tmp_path)),
        "speculator.draft_vocab_size": VOCABULARY,
        "serve.max_model_len": 64,
        "serve.drafter": "eagle",
        "serve.adaptive_drafting": False,
    }
    recorder = Recorder()
    engine = BuiltinEngine(load(environ={}, flags=flags), recorder)
    engine.start()

    def serve(request: str, *, speculate: bool = True) -> list[tuple[int, str]]:
        """Return number and version of the verify steps of a request whose second token leaves no room for a draft."""
        collect(submit(engine, Request(request, (3, 4, 5), 2, ignore_eos=True, speculate=speculate)))
        steps = recorder.verify_steps[request]
        assert not any(step.draft_tokens for step in steps)
        return [(step.verify_step, step.speculator) for step in steps]

    assert serve("a") == [(0, ""), (1, "day-0-head-0")]
    engine.swap(random_draft(engine._target.shape, 1), "1")
    assert serve("b") == [(0, ""), (1, "1")]
    assert serve("c", speculate=False) == [(0, ""), (1, "")]
    engine.speculate(on=False)
    assert serve("d") == [(0, ""), (1, "")]
    engine.stop()
