"""Long requests of the learning benchmark: a node serves a draft as the trainer scores it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_draft import oracle_draft
from tiny_target import VOCABULARY, write_tiny_target

from ops.bench.learning import long_requests
from ops.bench.learning.long_requests import LongRequestPlan, ServedRequest, plan_requests, serve_requests
from ops.bench.learning.recorded_traffic import RecordedTraffic
from schemas.settings import Settings, load
from schemas.speculator.network import EagleDraft
from serving.engines.builtin import packed_draft
from serving.planner.planner import Planner
from trainer.data.batch import collate
from trainer.data.samples import Sample, Teacher
from trainer.data.target import read_target
from trainer.objective.simulated_acceptance import simulate_chains

PLAN = LongRequestPlan(requests=4, shortest=60, longest=120, max_tokens=16, epochs=1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("long")
    flags = {
        "target.path": str(write_tiny_target(folder / "target")),
        "speculator.draft_vocab_size": VOCABULARY,
        "stack.data_dir": str(folder),
        "serve.max_model_len": 32,
        "serve.weight_dtype": "float32",
        "serve.num_speculative_tokens": 3,
        "kafka.max_message_bytes": 24_000,
        "train.max_sample_tokens": 8,
    }
    return load(environ={}, flags=flags)


def turn(settings: Settings, number: int) -> Sample:
    """A recorded request of seven tokens of prompt and five of answer."""
    generator = torch.Generator().manual_seed(number)
    width = 3 * read_target(settings).embeddings_VH.shape[1]
    tokens = torch.randint(2, VOCABULARY, (12,), generator=generator)
    known = torch.tensor([False] * 6 + [True] * 5)
    return Sample(
        request=f"turn-{number}",
        tokens=tokens[:-1],
        next_token=int(tokens[-1]),
        features=torch.randn(11, width, generator=generator).bfloat16(),
        known=known,
        teacher=Teacher(tokens[7:, None], torch.full((5, 1), -0.1)),
        label=("code", "math")[number % 2],
    )


@pytest.fixture(scope="module")
def traffic(settings: Settings) -> RecordedTraffic:
    return RecordedTraffic(tuple(turn(settings, number) for number in range(6)), "digest")


def test_long_requests_are_turns_of_one_domain_and_end_with_a_prompt(traffic: RecordedTraffic) -> None:
    requests = plan_requests(traffic, PLAN)
    assert sorted(len(request.prompt) for request in requests) == [60, 75, 89, 104]
    for request in requests:
        prompts = [sample.tokens[:7].tolist() for sample in traffic.requests if sample.label == request.label]
        assert list(request.prompt[-7:]) in prompts


@pytest.fixture(scope="module")
def draft(settings: Settings) -> EagleDraft:
    """A draft that is sometimes accepted, and whose proposals depend on earlier tokens."""
    head_VH = load_file(Path(settings.target.path) / "model.safetensors")["lm_head.weight"]
    draft = oracle_draft(read_target(settings).day_0.shape, head_VH)
    with torch.no_grad():
        draft.midlayer.self_attn.o_proj.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(4))
    return draft


@pytest.fixture(scope="module")
def served(settings: Settings, traffic: RecordedTraffic, draft: EagleDraft) -> list[ServedRequest]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_draft, "fastest_dtype", lambda _device: "float32")
        return list(serve_requests(settings, plan_requests(traffic, PLAN), draft))


def test_a_served_step_accepts_what_the_simulation_finds_at_its_root(
    settings: Settings, draft: EagleDraft, served: list[ServedRequest]
) -> None:
    embeddings_VH, accepted = read_target(settings).embeddings_VH, 0
    for one in served:
        assert one.chunks > 1, "the request travels in several chunks"
        steps = [step for step in one.verify_steps if len(step.draft_tokens) == 3]
        batch = collate([replace(one.sample, branches=())])
        roots_BT = torch.zeros(batch.tokens_BT.shape, dtype=torch.bool)
        roots_BT[0, [step.position for step in steps]] = True
        found = int(simulate_chains(draft, embeddings_VH, batch, 3, roots_BT).accepted_BTK.sum())
        assert found == sum(len(step.accepted) for step in steps)
        accepted += found
    assert accepted


def test_the_gate_counts_the_verify_steps_of_the_node(
    settings: Settings, draft: EagleDraft, served: list[ServedRequest]
) -> None:
    figure = long_requests.compare(settings, read_target(settings), draft, served)
    assert figure.value == 0
    assert figure.detail["verify_steps"] == figure.detail["walk_verify_steps"] > len(served)
    assert figure.detail["live_accepted_per_step"] == figure.detail["walk_accepted_per_step"] > 0
    assert figure.detail["live_off_gate_95"] == [0, 0]


def test_steps_before_the_draft_has_read_the_prompt_count_on_neither_side(
    settings: Settings, traffic: RecordedTraffic, draft: EagleDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_draft, "fastest_dtype", lambda _device: "float32")
    monkeypatch.setattr(Planner, "_limit_catch_up", lambda _self: 100)
    read_slowly = list(serve_requests(settings, plan_requests(traffic, PLAN), draft))
    figure = long_requests.compare(settings, read_target(settings), draft, read_slowly)
    assert figure.value == 0
    assert 0 < figure.detail["verify_steps"] < figure.detail["walk_verify_steps"]


def test_the_node_attends_to_as_much_of_a_prompt_as_the_gate(
    settings: Settings, traffic: RecordedTraffic, draft: EagleDraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_draft, "fastest_dtype", lambda _device: "float32")
    limits = {"context_tokens": 10, "max_sample_tokens": 64}
    near = settings.model_copy(update={"train": settings.train.model_copy(update=limits)})
    served = list(serve_requests(near, plan_requests(traffic, PLAN), draft))
    target = read_target(near)
    assert long_requests.compare(near, target, draft, served).value == 0
    assert long_requests.compare(settings, target, draft, served).value, "the rows before these make a difference"


def test_the_benchmark_serves_half_of_the_requests_with_what_it_learned_from_the_others(
    settings: Settings, traffic: RecordedTraffic
) -> None:
    figure = long_requests.measure(settings, traffic, PLAN, lambda _line: None)
    assert figure.detail["chunks"][0] > 1
    assert 60 < figure.detail["tokens"][0] < figure.detail["tokens"][1] <= 120
    assert figure.detail["verify_steps"] > 0
