"""Conversations that the target generates: their samples, their bounds, and how their tokens are chosen."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from chat_target import ASSISTANT, END, USER, write_chat_target
from tiny_target import EOS, VOCABULARY, write_tiny_target

from ops.bench import recording
from schemas.settings import Settings, load
from serving.engines.base import Request
from trainer.data import conversations
from trainer.data.conversations import (
    OPENERS,
    ChatTemplate,
    Opening,
    choose_tokens,
    draw_openings,
    find_past_prompts,
    generate,
    read_chat_template,
)
from trainer.data.samples import RequestSampling, Sample, split_sample
from trainer.data.target import GeneratingTarget, read_target

TEMPLATE = ChatTemplate((USER,), (END, ASSISTANT))
PROMPTS = ((5, 9, 11, 6), (7, 8), (12, 40, 41, 42, 43, 5, 9), (7, 30, 31))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("conversations")
    flags = {
        "target.path": str(write_tiny_target(folder / "target")),
        "speculator.draft_vocab_size": VOCABULARY,
        "serve.max_model_len": 255,
        "serve.weight_dtype": "float32",
        "traces.top_k": 5,
    }
    return load(environ={}, flags=flags)


@pytest.fixture(scope="module")
def target(settings: Settings) -> GeneratingTarget:
    layers = read_target(settings).day_0.shape.capture_layers
    return GeneratingTarget(Path(settings.target.path), layers, torch.device("cpu"))


def run(target: GeneratingTarget, openings: list[Opening], seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [sample for ended in generate(target, openings, 5, generator, "generated") for sample in ended]


def prompt_of(sample: Sample) -> tuple[int, ...]:
    return tuple(sample.tokens[: int(sample.known.nonzero()[0]) + 1].tolist())


@pytest.mark.parametrize("writes_prompt", [True, False])
def test_a_sample_equals_that_of_the_same_request_served_and_read_from_the_tables(
    settings: Settings, target: GeneratingTarget, tmp_path: Path, writes_prompt: bool
) -> None:
    openings = [Opening((USER,), 0.0, TEMPLATE)] * 4 if writes_prompt else [Opening(p, 0.0) for p in PROMPTS]
    generated = run(target, openings)
    assert len(generated) == 4
    requests = [Request(one.request, prompt_of(one), one.output_tokens, temperature=0.0) for one in generated]
    with recording.recording_engine(settings, len(requests), speculate=False) as (engine, recorder):
        recording.record_requests(engine, recorder, requests, tmp_path)
        fingerprint = engine.target
    for one in generated:
        served = recording.read_recorded_sample(tmp_path, one.request, fingerprint)
        assert one.committed_tokens() == served.committed_tokens()
        assert one.next_token == served.next_token
        assert one.position == served.position == 0
        assert torch.equal(one.known, served.known)
        assert torch.equal(one.teacher.ids, served.teacher.ids)
        torch.testing.assert_close(one.teacher.logprobs, served.teacher.logprobs, atol=1e-3, rtol=0)
        assert one.features.dtype is served.features.dtype is torch.bfloat16
        torch.testing.assert_close(one.features, served.features, atol=0.02, rtol=0.02)
        assert one.sampling == served.sampling == RequestSampling(0.0, 1.0, 0)
        (part,), (served_part,) = (split_sample(sample, 512, 1024) for sample in (one, served))
        assert part.own_rows == served_part.own_rows


def test_the_user_turn_ends_where_the_target_ends_it_or_at_its_bound(
    target: GeneratingTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "MAX_USER_TOKENS", 12)
    prompts = [prompt_of(one) for one in run(target, [Opening((USER,), 0.0, TEMPLATE)] * 32)]
    for prompt in prompts:
        assert prompt[0] == USER
        assert prompt[-2:] == (END, ASSISTANT)
        assert not {END, EOS} & set(prompt[1:-2]), "the turn ends at the first token that ends it"
        assert len(prompt) <= 1 + 12 + 2
    lengths = {len(prompt) for prompt in prompts}
    assert max(lengths) == 1 + 12 + 2
    assert min(lengths) < max(lengths)
    assert len(set(prompts)) > 24, "they are drawn, and differ"


def test_a_user_turn_begins_with_its_opener_and_the_target_continues_it(target: GeneratingTarget) -> None:
    opener = (9, 9, 30)
    prompts = [prompt_of(one) for one in run(target, [Opening((USER,), 0.0, TEMPLATE, opener)] * 32)]
    assert all(prompt[: 1 + len(opener)] == (USER, *opener) and prompt[-2:] == (END, ASSISTANT) for prompt in prompts)
    assert len({prompt[1 + len(opener) : -2] for prompt in prompts}) > 16, "each time differently"


def test_openings_are_of_all_kinds_of_tasks_and_temperatures() -> None:
    template = ChatTemplate((USER,), (END, ASSISTANT), (((),), ((5,), (6,)), ((7, 8),), ((9,),)))
    openings = draw_openings(template, 80, random.Random(0))
    assert {one.opener for one in openings} == {(), (5,), (6,), (7, 8), (9,)}
    turns = Counter((one.opener, one.temperature) for one in openings)
    for temperature in conversations.ANSWER_TEMPERATURES:
        assert turns[(), temperature] == turns[(7, 8), temperature] == turns[(9,), temperature] == 10
    assert all(one.tokens == (USER,) and one.template == template for one in openings)


def test_answers_end_at_an_end_token_their_bound_or_the_end_of_the_context(
    target: GeneratingTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "MAX_ANSWER_TOKENS", 20)
    long = tuple(5 + i % 40 for i in range(250))
    for one in run(target, [Opening(p, 1.0) for p in (*PROMPTS * 7, long, long)]):
        assert EOS not in one.tokens[len(prompt_of(one)) :]
        assert one.output_tokens <= 20
        assert one.next_token == EOS or one.output_tokens == 20 or one.committed == target.max_length


def test_the_last_answers_of_a_batch_are_cut_and_each_conversation_is_one_sample(target: GeneratingTarget) -> None:
    samples = run(target, [Opening((5, 6, 7 + i), 1.0, label=f"label-{i}") for i in range(32)])
    assert sorted(one.label or "" for one in samples) == sorted(f"label-{i}" for i in range(32))
    assert all(one.output_tokens == one.committed - 3 for one in samples)
    assert all(len(one.features) == len(one.tokens) == one.committed - 1 for one in samples)
    assert len({one.request for one in samples}) == 32


def test_tokens_are_drawn_from_the_distribution_at_the_temperature() -> None:
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0])
    draws, generator = 4000, torch.Generator().manual_seed(1)
    for temperature in (0.5, 1.0):
        chosen = choose_tokens(logits_V.expand(draws, -1), [temperature] * draws, generator)
        frequency_V = torch.tensor(chosen).bincount(minlength=4) / draws
        torch.testing.assert_close(frequency_V, (logits_V / temperature).softmax(-1), atol=0.03, rtol=0)
    mixed = choose_tokens(logits_V.expand(100, -1), [0.0, 1.0] * 50, generator)
    assert set(mixed[::2]) == {2}
    assert len(set(mixed[1::2])) > 1


def test_the_chat_template_is_split_at_the_first_user_message(tmp_path: Path) -> None:
    template = read_chat_template(write_chat_target(tmp_path / "target"))
    assert (template.before, template.after) == (TEMPLATE.before, TEMPLATE.after)
    assert [len(kind) for kind in template.openers] == [len(kind) for kind in OPENERS.values()]
    assert template.openers[0] == ((),)
    assert all(opener for kind in template.openers[1:] for opener in kind)


def test_a_target_without_a_chat_template_is_an_error(settings: Settings) -> None:
    with pytest.raises((OSError, ValueError)):
        read_chat_template(Path(settings.target.path))


def test_past_prompts_are_those_that_samples_hold_from_their_start(target: GeneratingTarget) -> None:
    samples = run(target, [Opening(p, 0.0, label=str(len(p))) for p in PROMPTS])
    parts = [part for one in samples for part in split_sample(one, 8, 4)]
    found = find_past_prompts(parts, 0.8)
    assert all(one.temperature == 0.8 and one.template is None for one in found)
    assert {one.tokens: one.label for one in found}.items() >= {p: str(len(p)) for p in PROMPTS}.items()
    assert len(found) == len({one.tokens for one in found})
    assert find_past_prompts(samples * 2, 0.8) == find_past_prompts(samples, 0.8)
    begun = [part for part in parts if part.position]
    assert begun
    for part in begun:
        part.preceding.resize_(0)
    assert not find_past_prompts(begun, 0.8), "the beginning is unknown"
