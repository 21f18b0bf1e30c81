"""Draft trees, a prefix cache, and faults around the plugin, none of which affects the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sglang_server import HERE, Server, eagle
from traced_chunks import all_tokens, chunks_of, rows_of, verify_steps_in
from transformers import AutoModelForCausalLM

from ops.local.kafka import Broker
from pipeline import topics
from schemas.draft_tree import is_chain
from schemas.settings import Kafka, Settings, load
from schemas.speculator.acceptance import accept
from schemas.trace.record import ROOT, VerifyStep

TOKENS = 36
WHOLE = {"ignore_eos": True}


@dataclass
class World:
    server: Server
    broker: Broker
    kafka: Kafka


@pytest.fixture(scope="module")
def world(
    serving: Any, trained_draft: Path, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[World]:
    """A server with draft trees, a prefix cache, a broker of its own, and a second plugin that breaks ours."""
    broker = Broker(tmp_path_factory.mktemp("broker"), free_port(), free_port())
    broker.start()
    flags = {
        "kafka.bootstrap_servers": broker.bootstrap,
        "traces.circuit_breaker_failures": 1,
        "traces.circuit_breaker_probe_interval": 1,
    }
    settings: Settings = load(environ={}, flags=flags)
    topics.create(settings.kafka)
    arguments = [*eagle(trained_draft, width=2, nodes=6), "--enable-metrics"]
    with serving(arguments, settings=settings, path=[HERE / "faulty"]) as server:
        yield World(server, broker, settings.kafka)
    broker.stop()


def test_traces_of_draft_trees_have_the_drafted_nodes_and_the_accepted_path(
    world: World, smollm2: Path, prompts: list[list[int]], target_outputs: list[list[int]]
) -> None:
    target: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    branched = accepted = 0
    for number, prompt in enumerate(prompts):
        name = f"tree-{number}"
        answer = world.server.generate(prompt, TOKENS, rid=name, sampling=WHOLE)
        assert answer["output_ids"] == target_outputs[number][:TOKENS]
        verify_steps = verify_steps_in(chunks_of(world.kafka, name))
        whole = [*prompt, *answer["output_ids"]]
        assert all_tokens(verify_steps) == whole[verify_steps[0].position :]
        for r in verify_steps[1:-1]:
            verdict = accept(r.draft_tokens, r.draft_parents, r.top_ids[:, 0].tolist())
            assert (verdict.path, verdict.bonus) == (r.accepted, r.bonus)
            branched += not is_chain(r.draft_parents)
            accepted += len(r.accepted)
        check_top_tokens(target, whole, verify_steps[1])
        check_top_tokens(target, whole, verify_steps[-2])
    assert branched > 10
    assert accepted > 20
    assert rows_of(world.kafka)["dead_letters"] == 0


def check_top_tokens(target: Any, whole: list[int], r: VerifyStep) -> None:
    """Check that the top tokens at each node are the target's after the path to it."""
    paths: dict[int, list[int]] = {ROOT: whole[: r.position + 1]}
    for node, (token, parent) in enumerate(zip(r.draft_tokens, r.draft_parents, strict=True)):
        paths[node] = [*paths[parent], token]
    for node, path in paths.items():
        with torch.inference_mode():
            logprobs = target(torch.tensor([path])).logits[0, -1].log_softmax(-1)
        ids = r.top_ids[1 + node]
        np.testing.assert_allclose(r.top_logprobs[1 + node], logprobs[ids.tolist()].numpy(), atol=2e-3)
        assert ids[0] == int(logprobs.argmax())


def test_prompt_tokens_from_the_prefix_cache_are_a_gap_in_the_trace(world: World, prompts: list[list[int]]) -> None:
    world.server.generate(prompts[0], 8, rid="first", sampling=WHOLE)
    before = world.server.metric("aurora_sglang_prompt_tokens_cached_total")
    answer = world.server.generate(prompts[0], 8, rid="second", sampling=WHOLE)
    chunks = chunks_of(world.kafka, "second")
    read = verify_steps_in(chunks)[0]
    cached = answer["meta_info"]["cached_tokens"]
    assert cached > 0
    assert (read.position, read.tokens) == (cached, tuple(prompts[0][cached:]))
    assert len(read.features) == len(read.tokens)
    assert chunks[0].envelope.chunk == 1
    assert world.server.metric("aurora_sglang_prompt_tokens_cached_total") == before + cached


def test_a_hook_that_raises_is_counted_and_the_server_continues(
    world: World, prompts: list[list[int]], target_outputs: list[list[int]]
) -> None:
    before = world.server.metric("aurora_sglang_hook_errors_total")
    answer = world.server.generate(prompts[0], TOKENS, rid="faulty-1", sampling=WHOLE)
    assert answer["output_ids"] == target_outputs[0][:TOKENS]
    assert world.server.metric("aurora_sglang_hook_errors_total") == before + 1
    assert world.server.process.log.read_text().count("aurora_hook_failed") == 1
    world.server.generate(prompts[0], 8, rid="after", sampling=WHOLE)
    assert chunks_of(world.kafka, "after")


def test_the_servers_own_metrics_remain(world: World, prompts: list[list[int]]) -> None:
    world.server.generate(prompts[0], 8, sampling=WHOLE)
    text = world.server.client.get("/metrics").text
    assert "sglang:e2e_request_latency_seconds_count" in text
    assert world.server.metric("aurora_sglang_hook_duration_seconds_count") > 0


def test_an_unreachable_broker_changes_no_answer(
    world: World, prompts: list[list[int]], target_outputs: list[list[int]]
) -> None:
    def ask() -> tuple[list[list[int]], float]:
        began = time.monotonic()
        outputs = [world.server.generate(prompt, TOKENS, sampling=WHOLE)["output_ids"] for prompt in prompts]
        return outputs, time.monotonic() - began

    ask()
    with_broker, usual_s = ask()
    world.broker.stop()
    without, took_s = ask()
    print(f"{usual_s:.2f} s with a broker, {took_s:.2f} s without")
    assert with_broker == without == [tokens[:TOKENS] for tokens in target_outputs]
    deadline = time.monotonic() + 30
    while not world.server.metric("aurora_serve_trace_rows_dropped_total"):
        assert time.monotonic() < deadline
        world.server.generate(prompts[0], 8, sampling=WHOLE)
    assert took_s < 5 * usual_s  # a server that waited for the broker would take minutes
