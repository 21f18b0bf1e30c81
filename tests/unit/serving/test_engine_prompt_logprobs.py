"""Log-probabilities of a prompt's own tokens, compared with those of Hugging Face's model."""

from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from tiny_target import VOCABULARY, write_tiny_target
from torch import Tensor
from transformers import LlamaForCausalLM

from schemas.settings import load
from serving.engines.base import Output, Request, TokenLogprobs
from serving.engines.builtin import prompt_logprobs
from serving.engines.builtin.engine import BuiltinEngine
from serving.engines.builtin.scheduler import MAX_PREFILL_TOKENS

LONG = tuple(1 + (7 * i * i + 3 * i) % (VOCABULARY - 1) for i in range(MAX_PREFILL_TOKENS + 45))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[BuiltinEngine]:
    flags = {"target.path": str(folder), "speculator.draft_vocab_size": VOCABULARY, "serve.max_model_len": 240}
    engine = BuiltinEngine(load(environ={}, flags=flags))
    engine.start()
    yield engine
    engine.stop()


def run(engine: BuiltinEngine, *requests: Request) -> list[list[Output]]:
    """Run the requests at the same time."""
    queues: list[SimpleQueue[Output]] = [SimpleQueue() for _ in requests]
    for request, queue in zip(requests, queues, strict=True):
        engine.submit(request, queue.put)
    outputs: list[list[Output]] = []
    for queue in queues:
        outputs.append([queue.get(timeout=60)])
        while outputs[-1][-1].finish is None:
            outputs[-1].append(queue.get(timeout=60))
    return outputs


def scored(outputs: list[Output]) -> list[TokenLogprobs]:
    return [one for output in outputs for one in output.prompt_logprobs]


def truth(folder: Path, prompt: tuple[int, ...]) -> Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1], dim=-1)


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_every_prompt_token_after_the_first_has_the_targets_log_probability(
    engine: BuiltinEngine, folder: Path, max_tokens: int
) -> None:
    options = {"ignore_eos": True, "prompt_logprobs": 5, "trace": max_tokens > 0}
    requests = [Request(f"{max_tokens} {n}", LONG[:n], max_tokens, **options) for n in (1, 2, 17, len(LONG))]
    for request, outputs in zip(requests, run(engine, *requests), strict=True):
        assert (outputs[-1].finish, outputs[-1].error) == ("length", None)
        assert sum(len(output.tokens) for output in outputs) == max_tokens
        found, expected_TV = scored(outputs), truth(folder, request.prompt)
        assert len(found) == len(request.prompt) - 1
        for one, token, logprobs_V in zip(found, request.prompt[1:], expected_TV, strict=True):
            assert one.logprob == pytest.approx(float(logprobs_V[token]), abs=1e-4)
            assert [logprob for _, logprob in one.top] == pytest.approx(logprobs_V.topk(5).values.tolist(), abs=1e-4)
            assert all(logprob == pytest.approx(float(logprobs_V[i]), abs=1e-4) for i, logprob in one.top)
            assert all(logprob == one.logprob for i, logprob in one.top if i == token)


def test_they_are_absent_by_default(engine: BuiltinEngine) -> None:
    (outputs,) = run(engine, Request("plain", LONG, 3, logprobs=2))
    assert scored(outputs) == []


def test_logits_exist_for_a_few_rows_at_a_time() -> None:
    rows: list[int] = []

    def logits(last_TH: Tensor) -> Tensor:
        rows.append(len(last_TH))
        return last_TH

    hidden_TH = torch.randn(40, VOCABULARY, generator=torch.Generator().manual_seed(1))
    found = prompt_logprobs.score_tokens(logits, hidden_TH, [3] * 40, 0)
    assert rows == [16, 16, 8]
    expected = torch.log_softmax(hidden_TH, -1)[:, 3].tolist()
    assert [one.logprob for one in found] == pytest.approx(expected, abs=1e-5)
    assert {one.top for one in found} == {()}


def test_a_request_whose_logits_are_not_finite_fails_alone(
    engine: BuiltinEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prompt_logprobs.topk
    monkeypatch.setattr(prompt_logprobs, "topk", lambda *_: (_ for _ in ()).throw(FloatingPointError("broken")))
    failed, served = run(engine, Request("scored", LONG, 2, prompt_logprobs=1), Request("other", LONG, 2))
    assert (failed[-1].finish, failed[-1].error) == ("error", "FloatingPointError: broken")
    assert served[-1].error is None
    monkeypatch.setattr(prompt_logprobs, "topk", whole)
    with pytest.raises(FloatingPointError, match="not finite"):
        prompt_logprobs.score_tokens(lambda x: x, torch.full((2, 5), float("nan")), [1, 2], 1)
