"""A grammar restricts the output as if the target were decoded alone with it, with and without speculation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from tiny_target import EOS, VOCABULARY, write_tiny_target
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from schemas.settings import load
from schemas.trace.record import DraftSource, VerifyStep
from serving.engines.base import Finish, Output, Request
from serving.engines.builtin.engine import BuiltinEngine
from serving.engines.builtin.grammar import Grammar, GrammarCompiler

PROMPT = (3, 14, 15, 9)
LETTERS = "".join(map(chr, range(65, 65 + VOCABULARY - 1)))
GRAMMAR = 'start: (/[A-F]/ "xyz" | /[G-Z]{1,3}/ "Q" | "rst")~8'
LANGUAGE = r"([A-F]xyz|[G-Z]{1,3}Q|rst){8}"


class _Traces:
    def __init__(self) -> None:
        self.verify_steps: list[VerifyStep] = []

    def record(self, _request: Request, verify_steps: tuple[VerifyStep, ...], _finish: Finish | None) -> None:
        self.verify_steps += verify_steps


def compiler() -> GrammarCompiler:
    vocab = {"<eos>": EOS} | {letter: i + 1 for i, letter in enumerate(LETTERS)}
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, merges=[])), eos_token="<eos>")
    return GrammarCompiler(fast, VOCABULARY, {EOS})


@pytest.fixture(params=["none", "chain", "tree", "suffix", "hybrid"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[BuiltinEngine, _Traces, LlamaForCausalLM]]:
    flags: dict[str, Any] = {
        "none": {"serve.speculate": False},
        "chain": {"serve.drafter": "eagle"},
        "tree": {"serve.drafter": "eagle", "serve.draft_tree_width": 3},
        "suffix": {"serve.drafter": "suffix"},
        "hybrid": {"serve.drafter": "hybrid", "serve.draft_tree_width": 2},
    }[request.param]
    folder = write_tiny_target(tmp_path)
    ours = {"target.path": str(folder), "speculator.draft_vocab_size": VOCABULARY, "serve.max_model_len": 128}
    traces = _Traces()
    engine = BuiltinEngine(load(environ={}, flags={**ours, "serve.adaptive_drafting": False, **flags}), traces)
    engine.start()
    yield engine, traces, LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine.stop()


def generate(engine: BuiltinEngine, *requests: Request) -> list[tuple[list[int], Output]]:
    queues: list[SimpleQueue[Output]] = [SimpleQueue() for _ in requests]
    for request, queue in zip(requests, queues, strict=True):
        engine.submit(request, queue.put)
    answers = []
    for queue in queues:
        outputs = [queue.get(timeout=60)]
        while outputs[-1].finish is None:
            outputs.append(queue.get(timeout=60))
        answers.append(([token for output in outputs for token in output.tokens], outputs[-1]))
    return answers


def reference(model: LlamaForCausalLM, grammar: Grammar) -> list[int]:
    """Greedy decoding without cache and drafts."""
    output: list[int] = []
    matcher = grammar.create_matcher()
    while output[-1:] != [EOS]:
        with torch.no_grad():
            logits_V = model(torch.tensor([[*PROMPT, *output]])).logits[0, -1]
        output.append(int(matcher.process(logits_V, output).argmax()))
    return output


def spell(output: list[int]) -> str:
    assert output[-1] == EOS
    return "".join(LETTERS[token - 1] for token in output[:-1])


def test_greedy_output_is_that_of_the_target_alone(engine: tuple[BuiltinEngine, _Traces, LlamaForCausalLM]) -> None:
    built_in, traces, model = engine
    grammar = compiler().compile(GRAMMAR)
    expected = reference(model, grammar)
    free = Request("free", PROMPT, 30)
    first, (beside, _), second = generate(
        built_in, Request("g", PROMPT, 100, grammar=grammar), free, Request("h", PROMPT, 100, grammar=grammar)
    )
    assert first[0] == second[0] == expected
    assert re.fullmatch(LANGUAGE, spell(expected))
    assert generate(built_in, free)[0][0] == beside
    if built_in.health().draft_depth or any(step.draft_tokens for step in traces.verify_steps):
        forced = [source & DraftSource.GRAMMAR for step in traces.verify_steps for source in step.draft_sources or ()]
        assert any(forced)


def test_forced_tokens_are_always_accepted(engine: tuple[BuiltinEngine, _Traces, LlamaForCausalLM]) -> None:
    built_in, traces, _ = engine
    grammar = compiler().compile('start: "ABCDEFGHIJKLMNOPQRSTUVWXYZ"')
    (output, last), *_ = generate(built_in, Request("g", PROMPT, 100, grammar=grammar))
    assert spell(output) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    drafted = [step for step in traces.verify_steps if step.draft_tokens]
    for step in drafted:
        assert len(step.accepted) == len(step.draft_tokens)
        assert set(step.draft_sources or ()) == {DraftSource.GRAMMAR}
        assert step.speculator == ""
    if built_in.health().speculating:
        assert last.stats is not None
        assert last.stats.verify_steps < 10


def test_a_sampled_output_is_the_same_with_and_without_drafts(
    engine: tuple[BuiltinEngine, _Traces, LlamaForCausalLM],
) -> None:
    built_in, _, _ = engine
    grammar = compiler().compile(GRAMMAR)
    for seed in range(6):
        requests = [
            Request(f"{seed}-{on}", PROMPT, 100, temperature=1.0, seed=seed, grammar=grammar, speculate=on)
            for on in (True, False)
        ]
        (drafted, _), (alone, _) = generate(built_in, *requests)
        assert drafted == alone
        assert re.fullmatch(LANGUAGE, spell(drafted))


def test_a_matcher_that_fails_ends_its_sequence_alone(
    engine: tuple[BuiltinEngine, _Traces, LlamaForCausalLM],
) -> None:
    built_in, _, _ = engine
    good = compiler().compile(GRAMMAR)

    class Failing:
        def create_matcher(self) -> Any:
            matcher = good.create_matcher()
            matcher._matcher.consume_token(EOS)
            return matcher

    free = Request("free", PROMPT, 30)
    (alone, _), *_ = generate(built_in, free)
    (beside, ended), (_, failed) = generate(built_in, free, Request("bad", PROMPT, 30, grammar=Failing()))
    assert (beside, ended.finish) == (alone, "length" if len(alone) == 30 else "stop")
    assert failed.finish == "error"
    assert built_in.health().speculating == built_in._may_speculate
    assert built_in.health().alive
    assert spell(generate(built_in, Request("g", PROMPT, 100, grammar=good))[0][0])


def test_a_matcher_that_fails_while_drafting_leaves_speculation_on(
    engine: tuple[BuiltinEngine, _Traces, LlamaForCausalLM],
) -> None:
    built_in, _, _ = engine
    good = compiler().compile(GRAMMAR)

    class FailingDrafts:
        def create_matcher(self) -> Any:
            matcher = good.create_matcher()
            matcher.constrain = fail  # type: ignore[method-assign]
            return matcher

    def fail(*_: Any) -> Any:
        raise RuntimeError("no tree")

    free = Request("free", PROMPT, 30)
    (alone, _), *_ = generate(built_in, free)
    (beside, _), (_, last) = generate(built_in, free, Request("bad", PROMPT, 100, grammar=FailingDrafts()))
    assert beside == alone
    assert last.finish == ("error" if built_in._may_speculate else "stop")
    assert built_in.health().drafter_failures == 0
    assert built_in.health().speculating == built_in._may_speculate
