"""A failure ends one request, or speculation; only a failed forward of the target ends the engine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import pytest
import torch
from engine_outputs import collect, submit
from tiny_target import VOCABULARY, write_tiny_target
from transformers import LlamaForCausalLM

from schemas.settings import load
from schemas.speculator.network import random_draft
from schemas.trace.record import VerifyStep
from serving.engines.base import EngineFullError, Finish, Output, Request
from serving.engines.builtin.engine import BuiltinEngine

PROMPT = (3, 14, 15, 9, 3, 14, 15)
BROKEN_TOKEN = VOCABULARY - 1
"""The target's logits after this token are not finite."""
DRAFTERS: dict[str, dict[str, object]] = {
    "chain": {"serve.drafter": "eagle"},
    "tree": {"serve.drafter": "eagle", "serve.draft_tree_width": 3},
    "suffix": {"serve.drafter": "suffix"},
    "hybrid tree": {"serve.draft_tree_width": 3},
}


def boom(*_args: Any, **_kwargs: Any) -> Any:
    raise RuntimeError("boom")


class Sink:
    """Takes traces and answers; raises for requests whose id begins with ``kind``."""

    def __init__(self, kind: str = "never") -> None:
        self.kind = kind
        self.finished: dict[str, Finish] = {}

    def record(self, request: Request, _verify_steps: tuple[VerifyStep, ...], finish: Finish | None) -> None:
        if finish is not None:
            self.finished[request.id] = finish
        if request.id.startswith(self.kind):
            boom()

    def publish(self, request: Request, _output: object) -> None:
        if request.id.startswith(self.kind):
            boom()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_target(tmp_path_factory.mktemp("target"))
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[BROKEN_TOKEN] = float("nan")
        model.lm_head.weight[BROKEN_TOKEN] = 0
    model.save_pretrained(folder)
    return folder


def create_engine(folder: Path, sink: Sink | None = None, answers: Sink | None = None, **flags: Any) -> BuiltinEngine:
    ours = {
        "target.path": str(folder),
        "speculator.draft_vocab_size": VOCABULARY,
        "serve.max_model_len": 96,
        "serve.max_num_seqs": 4,
        "serve.adaptive_drafting": False,
    }
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return BuiltinEngine(load(environ={}, flags=ours | named), sink, answers)


@contextmanager
def running(engine: BuiltinEngine) -> Iterator[BuiltinEngine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def generate(engine: BuiltinEngine, name: str, **options: Any) -> tuple[list[int], Output]:
    return collect(submit(engine, greedy(name, **options)))


def greedy(name: str, **options: Any) -> Request:
    return Request(name, PROMPT, options.pop("max_tokens", 30), ignore_eos=True, **options)


def assert_only_fails(engine: BuiltinEngine, failing: Request, message: str) -> None:
    """Assert that a request fails, and that those beside it and after it are answered as they would be alone."""
    alone, _ = generate(engine, "alone")
    sampled, _ = generate(engine, "sampled alone", temperature=0.8, seed=5, speculate=False)
    beside = submit(engine, greedy("beside"))
    failed = submit(engine, failing)
    also = submit(engine, greedy("also beside", temperature=0.8, seed=5, speculate=False))
    _, last = collect(failed)
    assert last.finish == "error"
    assert message in (last.error or "")
    assert collect(beside)[0] == alone
    assert collect(also)[0] == sampled
    assert [generate(engine, f"after {i}")[0] for i in range(5)] == [alone] * 5, "in every slot"
    health = engine.health()
    assert (health.alive, health.error, health.requests_running) == (True, None, 0)
    assert health.speculating


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sequence_whose_logits_are_not_finite_ends_alone(folder: Path, drafter: str, temperature: float) -> None:
    sink = Sink()
    with running(create_engine(folder, sink, **DRAFTERS[drafter])) as engine:
        failing = Request("failing", (3, 4, BROKEN_TOKEN), 20, temperature=temperature, ignore_eos=True)
        assert_only_fails(engine, failing, "FloatingPointError: the")
        assert engine.health().drafter_failures == 0
    assert sink.finished["failing"] == "error"


def test_a_request_that_is_cancelled_in_a_prompt_whose_values_are_not_finite_harms_no_later_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(create_engine(folder, serve__max_model_len=200, serve__max_num_seqs=2)) as engine:
        alone, _ = generate(engine, "alone", speculate=False)
        with monkeypatch.context() as patch:
            forward = engine._target.forward

            def cancel_and_forward(*args: Any) -> Any:
                engine.cancel("cancelled")
                return forward(*args)

            patch.setattr(engine._target, "forward", cancel_and_forward)
            prompt = (*PROMPT * 2, BROKEN_TOKEN, *PROMPT * 20)
            _, last = collect(submit(engine, Request("cancelled", prompt, 5)))
            assert last.finish == "cancelled"
        after = submit(engine, greedy("in its slot", speculate=False))
        beside = submit(engine, Request("beside", PROMPT * 3, 40, ignore_eos=True, speculate=False))
        assert collect(after)[0] == alone
        assert collect(beside)[1].finish == "length"


def test_a_sequence_with_invalid_sampling_parameters_ends_alone(folder: Path) -> None:
    with running(create_engine(folder)) as engine:
        assert_only_fails(engine, Request("failing", PROMPT, 20, temperature=float("nan")), "FloatingPointError")


def test_more_log_probabilities_than_tokens_are_those_of_all_tokens(folder: Path) -> None:
    with running(create_engine(folder, traces__top_k=VOCABULARY + 1)) as engine:
        _, last = generate(engine, "many", max_tokens=1, logprobs=VOCABULARY + 1)
        assert len(last.logprobs[0].top) == VOCABULARY


@pytest.mark.parametrize("temperature", [9.9e-7, 1e-38, 1e-45, 5e-324])
def test_tiny_temperatures_are_greedy(folder: Path, temperature: float) -> None:
    with running(create_engine(folder, serve__drafter="eagle")) as engine:
        assert generate(engine, "tiny", temperature=temperature)[0] == generate(engine, "greedy")[0]


def test_a_failing_trace_sink_ends_the_traced_request_alone(folder: Path) -> None:
    with running(create_engine(folder, Sink("failing"))) as engine:
        assert_only_fails(engine, greedy("failing"), "RuntimeError: boom")


def test_a_failing_answer_sink_fails_no_request(folder: Path) -> None:
    with running(create_engine(folder, answers=Sink("failing"))) as engine:
        tokens, last = generate(engine, "failing")
        assert (len(tokens), last.finish, last.error) == (30, "length", None)
        assert generate(engine, "after")[0] == tokens
        assert engine.health().alive


@pytest.mark.parametrize("failing_call", [1, 2, 5])
def test_a_failing_callback_ends_its_request_alone(folder: Path, failing_call: int) -> None:
    calls: list[Output] = []
    ended = Event()

    def take(output: Output) -> None:
        calls.append(output)
        if output.finish is not None:
            ended.set()
        if len(calls) >= failing_call:
            boom()

    with running(create_engine(folder)) as engine:
        beside = submit(engine, greedy("beside"))
        engine.submit(greedy("failing", temperature=1.0, seed=1), take)
        alone, last = collect(beside)
        assert (len(alone), last.finish) == (30, "length")
        assert ended.wait(60)
        assert len(calls) == failing_call + 1
        assert (calls[-1].finish, calls[-1].error) == ("error", "RuntimeError: boom")
        assert generate(engine, "after")[0] == alone
        assert engine.health().requests_running == 0


def test_a_callback_that_fails_at_the_end_of_its_request_ends_nothing_else(folder: Path) -> None:
    engine = create_engine(folder, Sink("sink"), serve__max_num_seqs=1)
    engine.submit(greedy("cancelled while it waits"), boom)
    engine.cancel("cancelled while it waits")
    engine.submit(greedy("last output", max_tokens=1), boom)
    engine.submit(greedy("sink and callback"), boom)
    with running(engine):
        assert len(generate(engine, "after")[0]) == 30
        engine.submit(greedy("stopped while it runs", max_tokens=80), boom)
        engine.submit(greedy("stopped while it waits", max_tokens=80), boom)
    assert engine.health().requests_running == engine.health().requests_waiting == 0
    assert engine.health().error is None


def break_draft(engine: BuiltinEngine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine._drafter.speculator, "draft", boom)


def break_second_step(engine: BuiltinEngine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine._drafter.speculator, "_consume_frontiers", boom)


def break_cached_rows(engine: BuiltinEngine, patch: pytest.MonkeyPatch) -> None:
    """Fail when the sequences' features are marked as seen, and their rows are not in the cache."""
    patch.setattr(engine._drafter.speculator._cache, "write", boom)  # type: ignore[union-attr]


def break_suffix(engine: BuiltinEngine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine.corpus, "find", boom)


def break_merge(engine: BuiltinEngine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine._planner, "select", boom)


def break_observation(engine: BuiltinEngine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine._planner, "observe_drafts", boom)


@pytest.mark.parametrize(
    ("drafter", "break_drafter"),
    [
        ("chain", break_draft),
        ("chain", break_second_step),
        ("tree", break_second_step),
        ("chain", break_cached_rows),
        ("hybrid tree", break_cached_rows),
        ("suffix", break_suffix),
        ("hybrid tree", break_suffix),
        ("hybrid tree", break_merge),
        ("hybrid tree", break_observation),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_failing_drafter_turns_speculation_off_and_every_request_is_answered(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    drafter: str,
    break_drafter: Callable[[BuiltinEngine, pytest.MonkeyPatch], None],
    temperature: float,
) -> None:
    with running(create_engine(folder, **DRAFTERS[drafter])) as engine:
        expected = generate(engine, "plain", speculate=False)[0]
        assert engine.health().drafter_failures == 0
        started, broken = Event(), Event()
        outputs: SimpleQueue[Output] = SimpleQueue()

        def take(output: Output) -> None:
            outputs.put(output)
            started.set()
            assert broken.wait(60)

        engine.submit(greedy("drafts already", max_tokens=80), take)
        beside = submit(engine, greedy("beside", temperature=temperature, seed=4))
        assert started.wait(60)
        with monkeypatch.context() as patch:
            break_drafter(engine, patch)
            broken.set()
            tokens, last = collect(outputs)
            assert (tokens[:30], len(tokens), last.finish) == (expected, 80, "length")
            assert collect(beside)[1].finish == "length"
        health = engine.health()
        assert (health.alive, health.speculating, health.drafter_failures) == (True, False, 1)
        tokens, last = generate(engine, "without")
        assert tokens == expected
        assert last.stats is not None
        assert last.stats.draft_tokens == 0
        engine.speculate(on=True)
        tokens, last = generate(engine, "repaired")
        assert tokens == expected
        assert last.stats is not None
        assert last.stats.draft_tokens > 0


def test_sequences_that_ran_when_a_drafter_failed_draft_no_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(create_engine(folder, serve__drafter="eagle")) as engine:
        failed = Event()
        outputs: SimpleQueue[Output] = SimpleQueue()

        def take(output: Output) -> None:
            outputs.put(output)
            if engine.health().drafter_failures and not failed.is_set():
                failed.set()
                monkeypatch.undo()
                engine.speculate(on=True)

        break_cached_rows(engine, monkeypatch)
        engine.submit(greedy("running", max_tokens=60), take)
        tokens, last = collect(outputs)
        assert failed.is_set()
        assert last.stats is not None
        assert last.stats.draft_tokens == 0
        assert tokens == generate(engine, "plain", max_tokens=60, speculate=False)[0]


@pytest.mark.parametrize("drafter", ["chain", "tree", "hybrid tree"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_version_whose_scores_are_not_finite_turns_speculation_off(
    folder: Path, drafter: str, temperature: float
) -> None:
    with running(create_engine(folder, **DRAFTERS[drafter])) as engine:
        expected = generate(engine, "plain", speculate=False)[0]
        draft = random_draft(engine._target.shape, 1)
        with torch.no_grad():
            draft.norm.weight.fill_(float("nan"))
        engine.swap(draft, "broken")
        # Of the likeliest token alone: any other draw may be the broken token.
        sampled = submit(engine, greedy("sampled", temperature=temperature, top_k=1))
        assert generate(engine, "greedy")[0] == expected
        assert collect(sampled)[1].finish == "length"
        health = engine.health()
        assert (health.alive, health.speculating, health.drafter_failures) == (True, False, 1)
        engine.swap(random_draft(engine._target.shape, 1), "good")
        engine.speculate(on=True)
        tokens, last = generate(engine, "repaired")
        assert tokens == expected
        assert last.stats is not None
        assert last.stats.speculators == ("good",)


@pytest.mark.parametrize("method", ["insert", "update"])
def test_a_failing_corpus_turns_speculation_off(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    with running(create_engine(folder, serve__suffix_scope="node")) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine.corpus, method, boom)
            tokens, last = generate(engine, "answered")
            after, _ = generate(engine, "after")
        assert (len(tokens), last.finish) == (30, "length")
        assert after == tokens
        health = engine.health()
        assert (health.alive, health.speculating) == (True, False)
        assert health.drafter_failures > 0


def test_a_failing_swap_raises_and_turns_speculation_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(create_engine(folder)) as engine:
        monkeypatch.setattr(engine._drafter.speculator, "swap", boom)
        found: SimpleQueue[Exception] = SimpleQueue()
        Thread(target=catch, args=(found, engine.swap, random_draft(engine._target.shape, 1), "1"), daemon=True).start()
        assert str(found.get(timeout=20)) == "boom"
        assert len(generate(engine, "after")[0]) == 30
        health = engine.health()
        assert (health.alive, health.speculating, health.drafter_failures) == (True, False, 1)


def catch(found: SimpleQueue[Exception], call: Callable[..., object], *args: object) -> None:
    try:
        call(*args)
    except Exception as error:  # noqa: BLE001 - the test looks at it
        found.put(error)


def test_a_failed_forward_ends_every_request_and_swap_with_the_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(create_engine(folder, serve__max_num_seqs=1)) as engine:
        blocked, go = Event(), Event()

        def fail_later(*_args: object) -> None:
            blocked.set()
            assert go.wait(60)
            boom()

        monkeypatch.setattr(engine._target, "forward", fail_later)
        requests = [submit(engine, greedy(str(number))) for number in range(3)]
        assert blocked.wait(60)
        found: SimpleQueue[Exception] = SimpleQueue()
        Thread(target=catch, args=(found, engine.swap, random_draft(engine._target.shape, 1), "1"), daemon=True).start()
        while not engine._swaps:
            pass
        go.set()
        for outputs in requests:
            tokens, last = collect(outputs)
            assert (tokens, last.finish, last.error) == ([], "error", "RuntimeError: boom")
        assert isinstance(found.get(timeout=20), EngineFullError)
        assert engine.health().error == "RuntimeError: boom"
        assert not engine.health().alive
        with pytest.raises(EngineFullError, match="boom"):
            engine.submit(greedy("late"), lambda _: None)
        with pytest.raises(EngineFullError, match="boom"):
            engine.swap(random_draft(engine._target.shape, 1), "2")


def test_a_stop_before_the_start_ends_every_request_and_swap(folder: Path) -> None:
    engine = create_engine(folder)
    waiting = submit(engine, greedy("waiting"))
    found: SimpleQueue[Exception] = SimpleQueue()
    Thread(target=catch, args=(found, engine.swap, random_draft(engine._target.shape, 1), "1"), daemon=True).start()
    while not engine._swaps:
        pass
    engine.stop()
    assert waiting.get(timeout=20).finish == "cancelled"
    assert isinstance(found.get(timeout=20), EngineFullError)


@pytest.mark.parametrize("token", [-1, VOCABULARY, 10**30])
def test_a_prompt_with_a_token_outside_the_vocabulary_is_rejected(folder: Path, token: int) -> None:
    engine = create_engine(folder)
    with pytest.raises(ValueError, match=f"vocabulary has {VOCABULARY} tokens, not the prompt's id {token}"):
        engine.submit(Request("outside", (1, token, 2), 4), lambda _: None)
