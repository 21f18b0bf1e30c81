"""A seed decides a sampled output, whatever is drafted, batched or swapped; every parameter keeps it lossless."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_sampling import choice_scores
from tiny_draft import oracle_draft
from tiny_target import EOS, VOCABULARY, write_tiny_target
from transformers import LlamaForCausalLM

from schemas.settings import load
from schemas.speculator.network import random_draft
from serving.engines.base import Output, Request
from serving.engines.builtin.engine import BuiltinEngine

NEAR_TIE = 1e-3
MAX_LEN = 96
MODES: dict[str, dict[str, object]] = {
    "no speculation": {"serve.speculate": False},
    "chain": {"serve.drafter": "eagle", "serve.adaptive_drafting": False, "serve.num_speculative_tokens": 3},
    "tree": {"serve.drafter": "eagle", "serve.adaptive_drafting": False, "serve.draft_tree_width": 3},
    "suffix": {"serve.drafter": "suffix", "serve.adaptive_drafting": False},
    "merged trees": {"serve.adaptive_drafting": False, "serve.draft_tree_width": 2},
    "adaptive hybrid": {},
}


@dataclass
class Bench:
    engine: BuiltinEngine
    reference: LlamaForCausalLM
    mode: str
    count: int = 0

    def run(self, requests: list[Request]) -> list[list[int]]:
        """Run the requests together and return their outputs."""
        queues: list[SimpleQueue[Output]] = []
        for request in requests:
            self.count += 1
            queues.append(SimpleQueue())
            self.engine.submit(replace(request, id=str(self.count)), queues[-1].put)
        return [collect(queue) for queue in queues]

    def swap(self, number: int) -> None:
        if self.mode not in {"no speculation", "suffix"}:
            self.engine.swap(
                oracle_draft(self.engine._target.shape, self.reference.lm_head.weight)
                if number == 0
                else random_draft(self.engine._target.shape, number),
                "v",
            )

    def assert_chosen_by_the_target(self, request: Request, output: list[int]) -> None:
        """Assert that each token is the target's choice after those before it; rounding may decide a near-tie."""
        with torch.inference_mode():
            rows = self.reference(torch.tensor([[*request.prompt, *output]])).logits[0, len(request.prompt) - 1 : -1]
        for n, token in enumerate(output):
            scores_V = choice_scores(rows[n], request, output[:n], {EOS})
            assert scores_V.max() - scores_V[token] < NEAR_TIE, (n, token)
        ends = request.stop_ids | (frozenset() if request.ignore_eos else {EOS})
        assert not ends & set(output[:-1])
        assert output[-1] in ends or len(output) == request.max_tokens


def collect(outputs: SimpleQueue[Output]) -> list[int]:
    taken = [outputs.get(timeout=60)]
    while taken[-1].finish is None:
        taken.append(outputs.get(timeout=60))
    assert taken[-1].finish in {"stop", "length"}, taken[-1].error
    return [token for output in taken for token in output.tokens]


@pytest.fixture(scope="module", params=MODES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = write_tiny_target(tmp_path_factory.mktemp("target"), scale=0.2)
    flags = {"target.path": str(folder), "speculator.draft_vocab_size": VOCABULARY, "serve.suffix_scope": "node"}
    flags |= {"serve.max_model_len": MAX_LEN, "serve.max_num_seqs": 3} | MODES[request.param]
    engine = BuiltinEngine(load(environ={}, flags=flags))
    engine.start()
    bench = Bench(engine, LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), request.param)
    bench.swap(0)
    yield bench
    engine.stop()


TOKENS = st.integers(0, VOCABULARY - 1)
REQUESTS = st.builds(
    Request,
    st.just(""),
    st.lists(TOKENS, min_size=1, max_size=12).map(tuple),
    st.integers(1, 24),
    temperature=st.sampled_from([0.0, 0.5, 0.8, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    top_k=st.sampled_from([0, 1, 20]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop_ids=st.frozensets(TOKENS, max_size=1),
    ignore_eos=st.booleans(),
    frequency_penalty=st.sampled_from([0.0, 0.0, -1.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    logit_bias=st.dictionaries(TOKENS, st.floats(-5, 5), max_size=3),
    allowed_token_ids=st.none() | st.none() | st.frozensets(TOKENS, min_size=2, max_size=30),
    min_tokens=st.sampled_from([0, 0, 5]),
    speculate=st.booleans(),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(REQUESTS, min_size=1, max_size=6), swaps=st.lists(st.integers(0, 3), max_size=2))
def test_every_output_token_is_the_choice_of_the_target_alone(
    bench: Bench, requests: list[Request], swaps: list[int]
) -> None:
    for number in swaps:
        bench.swap(number)
    for request, output in zip(requests, bench.run(requests), strict=True):
        bench.assert_chosen_by_the_target(request, output)


def test_a_seed_reproduces_an_output_whatever_is_drafted(bench: Bench) -> None:
    requests = [
        Request("", (5, 6, 7, 5, 6), 40, temperature=1.0, top_p=0.95, seed=seed, ignore_eos=True) for seed in range(6)
    ]
    bench.swap(0)
    together = bench.run(requests)
    alone = [bench.run([replace(request, speculate=False)])[0] for request in requests]
    bench.swap(2)
    swapped = bench.run(requests)
    assert together == alone == swapped
    assert len({tuple(output) for output in together}) == len(requests)


def test_requests_without_a_seed_differ(bench: Bench) -> None:
    request = Request("", (5, 6, 7), 30, temperature=1.0, ignore_eos=True)
    assert len({tuple(output) for output in bench.run([request] * 5)}) == 5


def test_the_speculators_drafts_are_accepted_more_often_than_by_chance(bench: Bench) -> None:
    if bench.mode not in {"chain", "tree", "merged trees"}:
        pytest.skip("the speculator does not draft in every step")
    bench.swap(0)
    before = bench.engine.health()
    bench.run([Request("", (5, 6, 7), 60, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(6)])
    after = bench.engine.health()
    steps = after.verify_steps - before.verify_steps
    assert after.accepted_tokens - before.accepted_tokens > 0.2 * steps
