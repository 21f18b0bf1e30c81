"""Stop tokens, maximum length, and log-probabilities of a request."""

from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from tiny_target import EOS, VOCABULARY, write_tiny_target
from transformers import LlamaForCausalLM

from schemas.settings import load
from serving.engines.base import Output, Request, TokenLogprobs
from serving.engines.builtin.engine import BuiltinEngine
from serving.engines.builtin.scheduler import MAX_PREFILL_TOKENS

PROMPT = (3, 14, 15, 9)


@pytest.fixture(scope="module", params=[1, 3], ids=["chain", "tree"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BuiltinEngine]:
    flags = {
        "target.path": str(write_tiny_target(tmp_path_factory.mktemp("target"))),
        "speculator.draft_vocab_size": VOCABULARY,
        "serve.max_model_len": 96,
        "serve.adaptive_drafting": False,
        "serve.draft_tree_width": request.param,
    }
    engine = BuiltinEngine(load(environ={}, flags=flags))
    engine.start()
    yield engine
    engine.stop()


def generate(engine: BuiltinEngine, request: Request) -> tuple[list[int], list[TokenLogprobs], Output]:
    outputs: SimpleQueue[Output] = SimpleQueue()
    engine.submit(request, outputs.put)
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    while True:
        output = outputs.get(timeout=60)
        tokens += output.tokens
        logprobs += output.logprobs
        if output.finish is not None:
            return tokens, logprobs, output


def test_output_ends_with_the_first_stop_token(engine: BuiltinEngine) -> None:
    whole, _, _ = generate(engine, Request("whole", PROMPT, 30, ignore_eos=True))
    stop = whole[10]
    tokens, _, last = generate(engine, Request("stopped", PROMPT, 30, ignore_eos=True, stop_ids=frozenset({stop})))
    assert tokens == whole[: whole.index(stop) + 1]
    assert last.finish == "stop"


def test_ignore_eos_continues_after_the_targets_eos_token(engine: BuiltinEngine) -> None:
    for seed in range(20):
        request = Request(f"until-{seed}", PROMPT, 80, temperature=2.0, seed=seed)
        tokens, _, last = generate(engine, request)
        if last.finish == "stop":
            break
    assert tokens[-1] == EOS
    beyond = Request("beyond", PROMPT, 80, temperature=2.0, seed=seed, ignore_eos=True)
    tokens, _, last = generate(engine, beyond)
    assert (len(tokens), last.finish) == (80, "length")


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_log_probabilities_are_the_targets_at_each_output_token(
    engine: BuiltinEngine, temperature: float, tmp_path: Path
) -> None:
    request = Request(f"found-{temperature}", PROMPT, 25, temperature=temperature, seed=5, logprobs=11, trace=False)
    tokens, logprobs, _ = generate(engine, request)
    model = LlamaForCausalLM.from_pretrained(write_tiny_target(tmp_path), dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([[*PROMPT, *tokens]])).logits[0, len(PROMPT) - 1 : -1]
    truth = torch.log_softmax(logits, dim=-1)
    assert len(logprobs) == len(tokens)
    for row, (token, found) in enumerate(zip(tokens, logprobs, strict=True)):
        assert found.logprob == pytest.approx(float(truth[row, token]), abs=1e-4)
        best = truth[row].topk(11)
        assert [logprob for _, logprob in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        if temperature == 0:
            assert found.logprob == pytest.approx(found.top[0][1], abs=1e-3)


def test_log_probabilities_work_with_a_prompt_longer_than_the_prefill_budget(tmp_path: Path) -> None:
    flags = {"target.path": str(write_tiny_target(tmp_path)), "speculator.draft_vocab_size": VOCABULARY}
    engine = BuiltinEngine(load(environ={}, flags={**flags, "serve.max_model_len": 240}))
    engine.start()
    prompt = tuple(1 + i % (VOCABULARY - 1) for i in range(MAX_PREFILL_TOKENS + 30))
    tokens, logprobs, last = generate(engine, Request("long", prompt, 5, ignore_eos=True, logprobs=2))
    engine.stop()
    assert (last.finish, last.error) == ("length", None)
    assert len(logprobs) == len(tokens) == 5


def test_output_has_no_log_probabilities_by_default(engine: BuiltinEngine) -> None:
    _, logprobs, _ = generate(engine, Request("plain", PROMPT, 5))
    assert logprobs == []


def test_output_is_never_longer_than_its_limit(engine: BuiltinEngine) -> None:
    for length in range(1, 9):
        tokens, _, last = generate(engine, Request(f"short-{length}", PROMPT, length, ignore_eos=True))
        assert len(tokens) == length
        assert last.finish == "length"
    prompt = tuple(1 + i % (VOCABULARY - 1) for i in range(90))
    tokens, _, _ = generate(engine, Request("to the limit", prompt, 50, ignore_eos=True))
    assert len(prompt) + len(tokens) == engine.max_tokens


def test_the_engine_compares_its_verify_steps_with_those_without_drafts(engine: BuiltinEngine) -> None:
    before = engine.health()
    _, _, last = generate(engine, Request("compared", PROMPT, 30, ignore_eos=True))
    after = engine.health()
    assert after.decoding_s > before.decoding_s
    assert after.undrafted_s > before.undrafted_s
    assert after.speedup is not None
    assert last.stats is not None
    assert last.stats.queue_s is not None
    engine.speculate(on=False)
    generate(engine, Request("plain", PROMPT, 5, ignore_eos=True))
    plain = engine.health()
    engine.speculate(on=True)
    assert (plain.speedup, plain.decoding_s) == (1.0, after.decoding_s)
