"""A logits processor changes the output as if the target were decoded alone with it, with and without speculation."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_sampling import plain_logits
from tiny_target import VOCABULARY, write_tiny_target
from torch import Tensor
from transformers import LlamaForCausalLM

from schemas.settings import load
from schemas.trace.record import VerifyStep
from serving.engines.base import Finish, Output, Request
from serving.engines.builtin.engine import BuiltinEngine
from serving.engines.builtin.logits_processors import create_processors, process

PROMPT = (3, 14, 15, 9)


class _Ban:
    """Excludes the last two output tokens, and records its calls."""

    def __init__(self) -> None:
        self.outputs: list[list[int]] = []

    def process(self, logits_V: Tensor, output: Sequence[int]) -> Tensor:
        self.outputs.append(list(output))
        logits_V[list(output[-2:])] = -torch.inf
        return logits_V


class _Traces:
    def __init__(self) -> None:
        self.verify_steps: list[VerifyStep] = []

    def record(self, _request: Request, verify_steps: tuple[VerifyStep, ...], _finish: Finish | None) -> None:
        self.verify_steps += verify_steps


@pytest.fixture(params=["none", "chain", "tree", "suffix"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[BuiltinEngine, _Traces, LlamaForCausalLM]]:
    flags = {
        "none": {"serve.speculate": False},
        "chain": {"serve.drafter": "eagle"},
        "tree": {"serve.drafter": "eagle", "serve.draft_tree_width": 3},
        "suffix": {"serve.drafter": "suffix"},
    }[request.param]
    folder = write_tiny_target(tmp_path)
    ours = {"target.path": str(folder), "speculator.draft_vocab_size": VOCABULARY, "serve.max_model_len": 128}
    traces = _Traces()
    engine = BuiltinEngine(load(environ={}, flags={**ours, "serve.adaptive_drafting": False, **flags}), traces)
    yield engine, traces, LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine.stop()


def test_greedy_output_follows_the_processor_and_traces_show_the_target(
    engine: tuple[BuiltinEngine, _Traces, LlamaForCausalLM],
) -> None:
    built_in, traces, reference = engine
    ban, outputs = _Ban(), SimpleQueue[Output]()
    built_in.submit(Request("one", PROMPT, 40, ignore_eos=True, logprobs=1), outputs.put)
    built_in._scheduler.waiting[0].processors = (ban,)
    built_in.start()
    taken = [outputs.get(timeout=60)]
    while taken[-1].finish is None:
        taken.append(outputs.get(timeout=60))
    output = [token for one in taken for token in one.tokens]
    logprobs = [one for each in taken for one in each.logprobs]
    alone: list[int] = []
    for shown in logprobs:
        with torch.inference_mode():
            logits_V = reference(torch.tensor([[*PROMPT, *alone]])).logits[0, -1]
        assert shown.top[0][0] == int(logits_V.argmax())
        allowed_V = _Ban().process(logits_V.clone(), alone)
        alone.append(int(allowed_V.argmax()))
        assert shown.logprob == pytest.approx(float(logits_V.log_softmax(-1)[alone[-1]]), abs=1e-3)
    assert output == alone
    assert len(output) == 40
    assert ban.outputs[:40] == [output[:n] for n in range(40)], "each call extends the one before by one token"
    first = traces.verify_steps[0]
    with torch.inference_mode():
        assert int(first.top_ids[-1, 0]) == int(reference(torch.tensor([PROMPT])).logits[0, -1].argmax())


def test_a_processor_that_excludes_every_token_ends_its_sequence_alone(
    engine: tuple[BuiltinEngine, _Traces, LlamaForCausalLM],
) -> None:
    class _BanAll:
        def process(self, logits_V: Tensor, output: Sequence[int]) -> Tensor:
            return logits_V.fill_(-torch.inf) if len(output) > 2 else logits_V

    built_in, _, _ = engine
    outputs: list[SimpleQueue[Output]] = [SimpleQueue(), SimpleQueue()]
    for i, each in enumerate(outputs):
        built_in.submit(Request(str(i), PROMPT, 8, ignore_eos=True), each.put)
    built_in._scheduler.waiting[0].processors = (_BanAll(),)
    built_in.start()
    last = []
    for each in outputs:
        last.append(each.get(timeout=60))
        while last[-1].finish is None:
            last[-1] = each.get(timeout=60)
    assert [one.finish for one in last] == ["error", "length"]
    assert "exclude every token" in (last[0].error or "")


TOKENS = st.integers(0, 5)
CONSTRAINED = st.builds(
    Request,
    st.just("r"),
    st.lists(TOKENS, min_size=1, max_size=4).map(tuple),
    st.just(9),
    stop_ids=st.frozensets(st.integers(0, 8), max_size=2),
    ignore_eos=st.booleans(),
    frequency_penalty=st.sampled_from([0.0, -2.0, 0.3, 2.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.7, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 5e-324, 1e-9, 0.5, 1.3, 1e308]),
    logit_bias=st.dictionaries(TOKENS, st.floats(-100, 100)),
    allowed_token_ids=st.none() | st.frozensets(TOKENS, min_size=1),
    min_tokens=st.integers(0, 6),
)


@given(
    CONSTRAINED,
    st.lists(st.lists(st.floats(-50, 50), min_size=6, max_size=6), min_size=1, max_size=6),
    st.lists(TOKENS, min_size=6, max_size=6),
)
def test_processors_equal_their_definitions_at_every_token_of_an_output(
    request: Request, rows: list[list[float]], output: list[int]
) -> None:
    processors = create_processors(request, frozenset({5}))
    for n, row in enumerate(rows):
        logits_V = torch.tensor(row)
        found_V = process(processors, logits_V, output[:n])
        assert torch.isfinite(found_V).any()
        torch.testing.assert_close(found_V, torch.tensor(plain_logits(logits_V.tolist(), request, output[:n], {5})))
        assert torch.equal(logits_V, torch.tensor(row)), "the target's own logits stay as they are"


def test_neutral_parameters_need_no_processor() -> None:
    assert create_processors(Request("r", (1,), 2, temperature=0.7, min_p=0.1), frozenset({5})) == ()
