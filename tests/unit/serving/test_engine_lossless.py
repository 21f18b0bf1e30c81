"""Output of the built-in engine equals the target's own, for every draft, swap and batch mix."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from engine_outputs import Recorder, collect
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_draft import oracle_draft
from tiny_target import EOS, VOCABULARY, write_tiny_target
from transformers import LlamaForCausalLM

from schemas.settings import Settings, Speculator, load
from schemas.speculator.day_0_draft import create_day_0_draft
from schemas.speculator.network import EagleDraft, random_draft
from schemas.trace.record import DraftSource
from serving.engines.base import EngineFullError, Finish, Output, Request
from serving.engines.builtin.engine import BuiltinEngine
from serving.engines.builtin.kv_cache import RaggedBatch, Segment
from serving.engines.builtin.scheduler import MAX_PREFILL_TOKENS
from serving.engines.builtin.target import Target

LIMIT = 240
NEAR_TIE = 1e-3


@dataclass
class Bench:
    engine: BuiltinEngine
    recorder: Recorder
    reference: LlamaForCausalLM
    mode: str
    count: int = 0

    def new_id(self) -> str:
        self.count += 1
        return f"request-{self.count}"

    def submit(self, request: Request) -> SimpleQueue[Output]:
        outputs: SimpleQueue[Output] = SimpleQueue()
        self.engine.submit(request, outputs.put)
        return outputs

    def generate(self, request: Request) -> tuple[list[int], Output]:
        return collect(self.submit(request))

    def target_alone(self, prompt: tuple[int, ...], length: int) -> torch.Tensor:
        """[length] the target's greedy output, one token at a time without a KV cache."""
        tokens = list(prompt)
        for _ in range(length):
            with torch.inference_mode():
                tokens.append(int(self.reference(torch.tensor([tokens])).logits[0, -1].argmax()))
        return torch.tensor(tokens[len(prompt) :])

    def assert_greedy(self, request: Request, output: list[int], finish: Finish | None) -> None:
        """Assert that every token is the target's argmax; in a near-tie fp32 rounding may decide."""
        with torch.inference_mode():
            scores = self.reference(torch.tensor([[*request.prompt, *output]])).logits[0, len(request.prompt) - 1 : -1]
        for position, token in enumerate(output):
            assert scores[position].max() - scores[position, token] < NEAR_TIE, (position, token)
        ends = request.stop_ids | (frozenset() if request.ignore_eos else {EOS})
        assert not ends & set(output[:-1])
        if finish == "stop":
            assert output[-1] in ends
        else:
            assert output[-1] not in ends
            assert len(output) == min(request.max_tokens, LIMIT - len(request.prompt))

    def change(self, number: int) -> None:
        """Swap in another draft, or turn speculation on or off."""
        if number < 0:
            self.engine.speculate(on=number == -1)
        else:
            draft = (
                oracle_draft(self.engine._target.shape, self.reference.lm_head.weight)
                if number == 0
                else random_draft(self.engine._target.shape, number)
            )
            self.swap(draft, str(number))

    def swap(self, draft: EagleDraft, version: str) -> None:
        """Swap in a draft; the suffix drafter has none."""
        if "suffix" not in self.mode:
            self.engine.swap(draft, version)


MODES: dict[str, dict[str, object]] = {
    "chain": {"serve.drafter": "eagle", "serve.adaptive_drafting": False, "serve.num_speculative_tokens": 3},
    "tree": {
        "serve.drafter": "eagle",
        "serve.adaptive_drafting": False,
        "serve.num_speculative_tokens": 4,
        "serve.draft_tree_width": 3,
        "serve.draft_tree_nodes": 9,
    },
    "adaptive chain": {"serve.drafter": "eagle"},
    "adaptive tree": {"serve.drafter": "eagle", "serve.draft_tree_width": 2, "serve.weight_dtype": "float32"},
    "suffix": {"serve.drafter": "suffix", "serve.adaptive_drafting": False, "serve.num_speculative_tokens": 4},
    "adaptive suffix": {"serve.drafter": "suffix"},
    "merged chains": {"serve.adaptive_drafting": False, "serve.num_speculative_tokens": 3},
    "merged trees": {
        "serve.adaptive_drafting": False,
        "serve.num_speculative_tokens": 4,
        "serve.draft_tree_width": 3,
        "serve.draft_tree_nodes": 9,
    },
    "adaptive hybrid": {},
}


@pytest.fixture(scope="module", params=MODES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = write_tiny_target(tmp_path_factory.mktemp("target"))
    recorder = Recorder()
    engine = BuiltinEngine(settings_for(folder, **MODES[request.param]), recorder)
    engine.start()
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    yield Bench(engine, recorder, reference, request.param)
    engine.stop()


def settings_for(folder: Path, **flags: object) -> Settings:
    return load(
        environ={},
        flags={
            **flags,
            "target.path": str(folder),
            "speculator.draft_vocab_size": VOCABULARY,
            "serve.suffix_scope": "node",
            "serve.max_model_len": LIMIT,
            "serve.max_num_seqs": 4,
            "serve.max_waiting_requests": 64,
        },
    )


prompts = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=40)


@dataclass(frozen=True)
class MixedRequest:
    """One request of a mix."""

    prompt: tuple[int, ...]
    length: int
    speculate: bool
    late: bool
    """Submit it only after the request before it has output."""
    stop: int | None
    ignore_eos: bool


mixed_requests = st.builds(
    MixedRequest,
    prompt=prompts.map(tuple),
    length=st.integers(1, 25),
    speculate=st.booleans(),
    late=st.booleans(),
    stop=st.none() | st.integers(1, VOCABULARY - 1),
    ignore_eos=st.booleans(),
)
changes = st.lists(st.integers(-2, 3), max_size=4)
"""-2 turns speculation off, -1 on; 0 swaps in a draft that is often accepted, 1 to 3 a random one."""


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mix=st.lists(st.tuples(mixed_requests, changes), min_size=1, max_size=7))
def test_greedy_output_equals_the_targets_own_in_every_batch_mix(
    bench: Bench, mix: list[tuple[MixedRequest, list[int]]]
) -> None:
    sent: list[tuple[Request, SimpleQueue[Output], list[Output]]] = []
    for wanted, changed in mix:
        request = Request(
            bench.new_id(),
            wanted.prompt,
            wanted.length,
            speculate=wanted.speculate,
            stop_ids=frozenset() if wanted.stop is None else frozenset({wanted.stop}),
            ignore_eos=wanted.ignore_eos,
        )
        if wanted.late and sent:
            sent[-1][2].append(sent[-1][1].get(timeout=60))
        sent.append((request, bench.submit(request), []))
        for change in changed:
            bench.change(change)
    for request, outputs, seen in sent:
        output, last = collect(outputs, seen)
        bench.assert_greedy(request, output, last.finish)
    bench.engine.speculate(on=True)


def test_greedy_output_of_one_request_equals_decoding_without_a_cache(bench: Bench) -> None:
    prompt = (3, 14, 15, 9, 26, 5)
    output, last = bench.generate(Request(bench.new_id(), prompt, 30))
    assert output == bench.target_alone(prompt, len(output)).tolist()
    assert last.stats is not None
    assert last.stats.verify_steps > 0
    if bench.mode == "chain":
        # The last drafts may be shorter, because the output has less room.
        assert 3 * (last.stats.verify_steps - 2) <= last.stats.draft_tokens <= 3 * last.stats.verify_steps


def test_a_good_draft_is_accepted_and_does_not_change_the_output(bench: Bench) -> None:
    prompt = (7, 8, 9, 10)
    bench.swap(random_draft(bench.engine._target.shape, 1), "bad")
    before, _ = bench.generate(Request(bench.new_id(), prompt, 60))
    bench.swap(oracle_draft(bench.engine._target.shape, bench.reference.lm_head.weight), "good")
    after, last = bench.generate(Request(bench.new_id(), prompt, 60))
    assert after == before
    assert last.stats is not None
    assert last.stats.speculators in {(), ("good",)}
    if "adaptive" not in bench.mode:  # drafting rarely pays on a target this small
        assert last.stats.accepted_tokens > 0


def test_a_prompt_longer_than_the_prefill_budget_is_read_in_pieces(bench: Bench) -> None:
    prompt = tuple(1 + i % (VOCABULARY - 1) for i in range(MAX_PREFILL_TOKENS + 30))
    request = Request(bench.new_id(), prompt, 12)
    output, last = bench.generate(request)
    bench.assert_greedy(request, output, last.finish)
    pieces = [r for r in bench.recorder.verify_steps[request.id] if r.verify_step == 0]
    assert [len(p.tokens) for p in pieces] == [MAX_PREFILL_TOKENS, 30]
    assert [p.bonus is None for p in pieces] == [True, False]


def test_prompt_pieces_respect_the_maximum_prefill_stall_while_others_decode(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []

    def limit_prompt_rows(*, decode_rows: int, max_rows: int, catch_up: int) -> int:
        assert decode_rows >= 1
        limits.append(max_rows)
        return 32

    monkeypatch.setattr(bench.engine._planner, "limit_prompt_rows", limit_prompt_rows)
    running = bench.submit(Request(bench.new_id(), (3, 7), 90, ignore_eos=True))
    first = running.get(timeout=60)
    prompt = tuple(1 + i % (VOCABULARY - 1) for i in range(100))
    request = Request(bench.new_id(), prompt, 2)
    output, last = bench.generate(request)
    bench.assert_greedy(request, output, last.finish)
    pieces = [len(r.tokens) for r in bench.recorder.verify_steps[request.id] if r.verify_step == 0]
    assert pieces == [32, 32, 32, 4]
    assert set(limits) == {MAX_PREFILL_TOKENS}
    collect(running, [first])


def test_a_trace_holds_prompt_and_output_with_the_targets_features(bench: Bench) -> None:
    bench.swap(oracle_draft(bench.engine._target.shape, bench.reference.lm_head.weight), "oracle")
    request = Request(bench.new_id(), (11, 12, 13, 14, 15), 40)
    output, last = bench.generate(request)
    verify_steps = bench.recorder.verify_steps[request.id]
    assert bench.recorder.finished[request.id] == last.finish
    tokens = [token for r in verify_steps for token in r.tokens]
    assert [*tokens, verify_steps[-1].bonus] == [*request.prompt, *output]
    position = 0
    with torch.inference_mode():
        truth = bench.reference(torch.tensor([tokens]), output_hidden_states=True)
        layers = [truth.hidden_states[i + 1][0] for i in bench.engine._target.shape.capture_layers]
        features_TF = torch.cat(layers, dim=-1).to(torch.bfloat16).float()
    for r in verify_steps:
        assert r.position == position
        found = torch.from_numpy(r.features).view(torch.bfloat16).float()
        expected = features_TF[position : position + len(r.tokens)]
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        root_scores = truth.logits[0, position + (len(r.tokens) - 1 if r.verify_step == 0 else 0)]
        assert int(r.top_ids[0, 0]) == int(root_scores.argmax())
        expected_logprobs = torch.log_softmax(root_scores, -1)[torch.from_numpy(r.top_ids[0]).long()]
        torch.testing.assert_close(torch.from_numpy(r.top_logprobs[0]), expected_logprobs, rtol=1e-3, atol=1e-3)
        position += len(r.tokens)


def test_a_cancelled_request_ends_and_frees_its_slot(bench: Bench) -> None:
    requests = [Request(bench.new_id(), (5, 6, 7), LIMIT, ignore_eos=True) for _ in range(6)]
    outputs: list[SimpleQueue[Output]] = [SimpleQueue() for _ in requests]

    def take(number: int, output: Output) -> None:
        if number % 2 == 0:
            bench.engine.cancel(requests[number].id)
        outputs[number].put(output)

    for number, request in enumerate(requests):
        bench.engine.submit(request, partial(take, number))
    assert [collect(o)[1].finish for o in outputs] == ["cancelled", "length"] * 3
    health = bench.engine.health()
    assert (health.requests_running, health.requests_waiting) == (0, 0)


def test_requests_beyond_the_waiting_limit_are_rejected(tmp_path: Path) -> None:
    settings_ = load(
        environ={},
        flags={
            "target.path": str(write_tiny_target(tmp_path)),
            "serve.max_waiting_requests": 1,
            "serve.max_model_len": LIMIT,
        },
    )
    engine = BuiltinEngine(settings_)
    engine.submit(Request("first", (1, 2), 4), lambda _: None)
    with pytest.raises(EngineFullError, match=r"serve\.max_waiting_requests"):
        engine.submit(Request("second", (1, 2), 4), lambda _: None)


def test_stop_finishes_every_request(tmp_path: Path) -> None:
    engine = BuiltinEngine(settings_for(write_tiny_target(tmp_path)))
    answers: SimpleQueue[Output] = SimpleQueue()
    for i in range(9):
        engine.submit(Request(str(i), (1, 2), LIMIT), answers.put)
    engine.start()
    engine.stop()
    finishes = []
    while not answers.empty():
        finishes.append(answers.get().finish)
    assert sum(f is not None for f in finishes) == 9


@pytest.mark.parametrize("draft_kv_heads", [0, 4])
def test_segments_in_one_batch_do_not_see_each_other(tmp_path: Path, draft_kv_heads: int) -> None:
    folder = write_tiny_target(tmp_path)
    speculator = Speculator(draft_vocab_size=VOCABULARY, num_key_value_heads=draft_kv_heads)
    shape = create_day_0_draft(folder, speculator).shape
    target = Target(folder, shape, slots=3, positions=64)
    first, second = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2, 6])
    with torch.inference_mode():
        mixed = target.forward(torch.cat([first, second]), RaggedBatch([Segment(2, 0, 5), Segment(0, 0, 3)]))
        alone = target.forward(second, RaggedBatch([Segment(1, 0, 3)]))
    torch.testing.assert_close(mixed.last_TH[5:], alone.last_TH, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["chain", "tree", "merged chains", "merged trees"])
def test_a_swap_to_another_draft_vocabulary_changes_no_output(tmp_path: Path, mode: str) -> None:
    folder, size, recorder = write_tiny_target(tmp_path), 30, Recorder()
    settings = settings_for(folder, **MODES[mode])
    speculator = settings.speculator.model_copy(update={"draft_vocab_size": size})
    engine = BuiltinEngine(settings.model_copy(update={"speculator": speculator}), recorder)
    bench = Bench(engine, recorder, LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), mode)
    shape, head_VH = create_day_0_draft(folder, speculator).shape, bench.reference.lm_head.weight
    vocabularies = {"low": range(size), "high": range(VOCABULARY - size, VOCABULARY)}
    drafts = {name: oracle_draft(shape, head_VH, torch.tensor(ids)) for name, ids in vocabularies.items()}
    engine.start()
    sampled = Request("sampled", (5, 9, 2), 60, temperature=0.8, seed=3, ignore_eos=True)
    unspeculated, _ = bench.generate(replace(sampled, id="alone", speculate=False))
    requests = [*(Request(f"greedy {i}", (3 + i, 14, 15), 90, ignore_eos=True) for i in range(3)), sampled]
    running = [bench.submit(request) for request in requests]
    seen = [[outputs.get(timeout=60)] for outputs in running]
    for name in ("high", "low") * 4:
        engine.check(drafts[name])
        engine.swap(drafts[name], name)
        if seen[0][-1].finish is None:
            seen[0].append(running[0].get(timeout=60))
    outputs = [collect(*one) for one in zip(running, seen, strict=True)]
    for request, (output, last) in zip(requests[:3], outputs, strict=False):
        bench.assert_greedy(request, output, last.finish)
    assert outputs[3][0] == unspeculated
    engine.swap(drafts["high"], "high")
    bench.generate(Request("last", (7, 8, 9, 10), 60, ignore_eos=True))
    engine.stop()
    accepted = dict.fromkeys(vocabularies, 0)
    for step in (step for steps in recorder.verify_steps.values() for step in steps):
        sources = step.draft_sources or (DraftSource.SPECULATOR,) * len(step.draft_tokens)
        own = {i for i, source in enumerate(sources) if source & DraftSource.SPECULATOR}
        if step.speculator in vocabularies:
            assert {step.draft_tokens[i] for i in own} <= set(vocabularies[step.speculator])
            accepted[step.speculator] += len(own.intersection(step.accepted))
    assert accepted["high"] > 0
