"""The whole loop around vLLM's own server, started as a user does; one server for all tests of this file, in order."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from bfloat16 import from_bf16
from built_in import eos_of, verify_steps_of
from pydantic import SecretStr
from serving_node import eventually
from stream_worker import worker
from traced_chunks import all_tokens, chunks_of, every_chunk, rows_of, verify_steps_in
from traced_drafts import loop_flags
from trainer_world import RUN_PROMOTER, RUN_TRAINER, process
from vllm_node import KEY, PYTHON, WHOLE, VllmNode

from pipeline import topics
from schemas.hash_sampling import prompt_key
from schemas.settings import Settings, load
from schemas.speculator import checkpoint
from schemas.speculator.target_fingerprint import target_fingerprint
from schemas.trace.record import VerifyStep
from serving.engines.node.command_line import DraftFolder
from serving.engines.node.server_client import ServerCounters, ServerError
from serving.engines.node.sidecar import read_target_line
from serving.engines.vllm.node.vllm_client import VllmClient
from serving.engines.vllm.node.vllm_engine import VllmEngine
from trainer.data.held_out import is_held_out
from trainer.release.registry import SpeculatorRegistry

FIRST = DraftFolder(Path(), "day-0-head-0")
"""The node has started the extension; a second start changes nothing."""
TOKENS = 36
LEARNED = 1.4
"""Acceptance length: bonus token included; 1 without any accepted draft token."""
TRAIN_TIMEOUT_S = 300
HELD_OUT_PROMPTS = 6
"""The gate needs several prompts, which differ, for the bounds of a gain."""


@pytest.fixture(scope="module")
def settings(
    smollm2: Path, broker: str, registry: str, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Settings:
    folder = tmp_path_factory.mktemp("vllm-loop")
    flags = loop_flags(smollm2, broker, registry, folder, free_port) | {
        "serve.engine": "vllm",
        "serve.node": "vllm-0",
        # The built-in engine's traces to compare with are those of a speculator alone.
        "serve.drafter": "eagle",
        "vllm.python": str(PYTHON),
        "vllm.draft_dir": str(folder / "vllm"),
        "vllm.api_key": KEY,
        # The stand is a slow one: each request is to be traced.
        "vllm.max_capture_ratio": 1.0,
    }
    found = load(environ={}, flags=flags)
    topics.create(found.kafka)
    return found


@pytest.fixture(scope="module")
def engine_node(
    settings: Settings, tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[VllmNode]:
    log = tmp_path_factory.mktemp("vllm-node") / "node.log"
    running = VllmNode(settings, free_port(), log, ["--max-model-len", "512", "--max-num-seqs", "8"])
    try:
        running.start()
        yield running
    finally:
        running.close()


@pytest.fixture
def engine(engine_node: VllmNode, smollm2: Path, tmp_path: Path) -> Iterator[VllmEngine]:
    """A second engine beside the node's own, which has no version to follow before the last test."""
    client = VllmClient(engine_node.url, SecretStr(KEY), 60)
    line = read_target_line(engine_node.settings)
    connected = VllmEngine(client, line.target, line.name, FIRST, 3, tmp_path / "incoming", 60)
    connected.start()
    yield connected
    connected.stop()
    client.close()


def swap(engine: VllmEngine, folder: Path, version: str) -> float:
    return engine.swap(checkpoint.read_checkpoint(folder, engine.line), version).pause_ms


def compare(a: VerifyStep, b: VerifyStep, *, same_drafts: bool) -> None:
    """Compare verify steps of vLLM and of the built-in engine, which drafts less near the length limit."""
    assert (a.verify_step, a.position, a.tokens, a.accepted, a.bonus) == (
        b.verify_step,
        b.position,
        b.tokens,
        b.accepted,
        b.bonus,
    )
    kept = len(b.draft_tokens)
    assert a.draft_tokens[:kept] == b.draft_tokens
    assert a.draft_parents[:kept] == b.draft_parents
    assert kept == len(a.draft_tokens) or not same_drafts
    np.testing.assert_array_equal(a.top_ids[: 1 + kept, :3], b.top_ids[:, :3])
    np.testing.assert_allclose(a.top_logprobs[: 1 + kept], b.top_logprobs, atol=2e-3)
    np.testing.assert_allclose(from_bf16(a.features), from_bf16(b.features), rtol=2e-2, atol=2e-2)
    assert bool(a.verify_step) == bool(a.speculator)


def test_a_target_without_a_speculator_is_served_with_the_day_0_draft(
    engine_node: VllmNode, prompts: list[list[int]], target_outputs: list[list[int]]
) -> None:
    assert engine_node.complete_all(prompts, 40, "first", **WHOLE) == [tokens[:40] for tokens in target_outputs]
    eventually(lambda: engine_node.status.output_tokens >= 40 * len(prompts))
    status = engine_node.status
    assert (status.speculator, status.line) == ("day-0-head-0", read_target_line(engine_node.settings).name)
    assert status.draft_tokens > 0


def test_clients_cannot_call_the_development_endpoints(engine_node: VllmNode, engine: VllmEngine) -> None:
    for path in ("/collective_rpc", "/pause", "/sleep", "/update_weights", "/collective_rpc/"):
        answer = engine_node.client.post(path, json={"method": "aurora_start", "args": ["9"]}, follow_redirects=True)
        assert answer.status_code == 401, path
    with pytest.raises(ServerError, match="another key"):
        VllmClient(engine_node.url, SecretStr("wrong"), 5).start(FIRST)
    assert engine_node.client.get("/v1/models").status_code == 200


def test_traces_are_those_of_the_built_in_engine(
    engine_node: VllmNode,
    engine: VllmEngine,
    smollm2: Path,
    trained_draft: Path,
    prompts: list[list[int]],
    target_outputs: list[list[int]],
) -> None:
    kafka = engine_node.settings.kafka
    swap(engine, trained_draft, "7")
    requests = {f"same-{number}": prompt for number, prompt in enumerate(prompts)}
    outputs = [engine_node.complete(prompt, TOKENS, name, **WHOLE) for name, prompt in requests.items()]
    assert outputs == [tokens[:TOKENS] for tokens in target_outputs]
    expected = verify_steps_of(smollm2, trained_draft, requests, TOKENS, steps=3)
    accepted = 0
    for name, prompt in requests.items():
        ours, theirs = verify_steps_in(chunks_of(kafka, name)), expected[name]
        assert ours[0].tokens == tuple(prompt)
        assert all_tokens(ours) == all_tokens(theirs)
        for a, b in zip(ours, theirs, strict=True):
            compare(a, b, same_drafts=b.position + 5 < len(prompt) + TOKENS)
        accepted += sum(len(r.accepted) for r in ours)
    assert accepted > 20
    rows = rows_of(kafka)
    assert rows["dead_letters"] == 0
    assert min(rows["accepted"], rows["rejected"], rows["traces"]) > 0


def test_a_chunk_names_its_target_line_and_version(
    engine_node: VllmNode, smollm2: Path, trained_draft: Path, prompts: list[list[int]]
) -> None:
    engine_node.complete(prompts[0], 8, "named", temperature=0.5, top_p=0.9, **WHOLE)
    (chunk,) = chunks_of(engine_node.settings.kafka, "named")
    envelope, line = chunk.envelope, checkpoint.read_manifest(trained_draft).line
    assert (envelope.target, envelope.line) == (target_fingerprint(smollm2), line)
    assert (envelope.node, envelope.finish, envelope.temperature) == ("vllm-0", "length", 0.5)
    assert (envelope.top_p, envelope.sampling_top_k, envelope.vocab_size) == (0.9, 0, 49152)
    assert {r.speculator for r in chunk.verify_steps if r.verify_step} == {"7"}
    assert all(r.verify_us > 0 for r in chunk.verify_steps)
    assert all(r.draft_us > 0 for r in chunk.verify_steps if r.verify_step)


def test_a_trace_ends_with_the_answer_although_more_tokens_were_accepted(
    engine_node: VllmNode, smollm2: Path, prompts: list[list[int]]
) -> None:
    output = engine_node.complete(prompts[1], TOKENS, "stopped")
    (chunk,) = chunks_of(engine_node.settings.kafka, "stopped")
    assert chunk.envelope.finish == "stop"
    assert all_tokens(chunk.verify_steps) == [*prompts[1], *output]
    assert chunk.verify_steps[-1].bonus == eos_of(smollm2)


def test_a_prompt_from_the_prefix_cache_is_traced_from_its_first_computed_token(
    engine_node: VllmNode, prompts: list[list[int]]
) -> None:
    # Several of vLLM's blocks of 128 tokens on a CPU: with EAGLE it computes the last cached one again.
    prompt = list(islice(cycle(token for prompt in prompts for token in prompt), 480))
    for name in ("before", "cached"):
        engine_node.complete(prompt, 4, name, cache_salt="shared", **WHOLE)
    whole, cached = (verify_steps_in(chunks_of(engine_node.settings.kafka, name)) for name in ("before", "cached"))
    assert whole[0].position == 0
    assert cached[0].position > 0
    assert all_tokens(cached) == all_tokens(whole)[cached[0].position :]


def test_a_request_that_opts_out_is_not_traced(engine_node: VllmNode, prompts: list[list[int]]) -> None:
    kafka, options = engine_node.settings.kafka, {"vllm_xargs": {"aurora_trace": "off", "aurora_label": "untraced"}}
    engine_node.complete(prompts[0], 4, "untraced", **options, **WHOLE)
    engine_node.complete(prompts[0], 4, "traced", **WHOLE)
    chunks_of(kafka, "traced")
    assert not [chunk for chunk in every_chunk(kafka) if chunk.envelope.label == "untraced"]
    metrics = engine_node.client.get("/metrics").text
    assert 'aurora_vllm_requests_untraced_total{reason="opt_out"} 1.0' in metrics
    errors = [line for line in metrics.splitlines() if line.startswith("aurora_vllm_hook_errors_total{")]
    assert errors
    assert all(line.endswith(" 0.0") for line in errors)


def test_a_swap_loses_no_request_and_each_verify_step_names_the_version_that_drafted(
    engine_node: VllmNode,
    engine: VllmEngine,
    random_draft: Path,
    trained_draft: Path,
    prompts: list[list[int]],
    target_outputs: list[list[int]],
) -> None:
    swap(engine, random_draft, "day-0-head-0")
    with ThreadPoolExecutor() as pool:
        answering = pool.submit(engine_node.complete_all, prompts, 120, "swapped", **WHOLE)
        eventually(lambda: engine_node.status.requests_running == len(prompts))
        pause_ms = swap(engine, trained_draft, "2")
        answers = answering.result()
    print(f"paused for {pause_ms:.0f} ms")
    assert answers == target_outputs
    accepted = {"day-0-head-0": 0, "2": 0}
    for number in range(len(prompts)):
        steps = [
            r for r in verify_steps_in(chunks_of(engine_node.settings.kafka, f"swapped-{number}")) if r.verify_step
        ]
        versions = [r.speculator for r in steps]
        assert versions == sorted(versions, key=["day-0-head-0", "2"].index)
        assert set(versions) == {"day-0-head-0", "2"}
        for r in steps:
            accepted[r.speculator] += len(r.accepted)
    assert accepted["day-0-head-0"] <= 1
    assert accepted["2"] > 10


def test_a_version_that_cannot_be_read_leaves_the_one_before(
    engine_node: VllmNode,
    engine: VllmEngine,
    random_draft: Path,
    prompts: list[list[int]],
    target_outputs: list[list[int]],
) -> None:
    client, folder = VllmClient(engine_node.url, SecretStr(KEY), 60), random_draft

    def read() -> bool:
        return client.read(folder, "0" * 64)

    with pytest.raises(ServerError, match="is not the expected 0000"):
        eventually(read)
    with pytest.raises(ServerError, match="no version has been read"):
        client.load("9")
    before = engine_node.status.accepted_tokens
    assert engine_node.complete_all(prompts, 40, "kept", **WHOLE) == [tokens[:40] for tokens in target_outputs]
    eventually(lambda: engine_node.status.accepted_tokens > before + 10)


def test_its_traces_train_a_version_that_it_serves(
    engine_node: VllmNode,
    engine: VllmEngine,
    random_draft: Path,
    prompts: list[list[int]],
    target_outputs: list[list[int]],
    tmp_path: Path,
) -> None:
    settings, line = engine_node.settings, read_target_line(engine_node.settings).name
    swap(engine, random_draft, "day-0-head-0")
    share = settings.train.held_out_ratio
    learned = [i for i, prompt in enumerate(prompts) if not is_held_out(prompt_key(prompt), share)]
    prompts, outputs = [prompts[i] for i in learned], [target_outputs[i][:40] for i in learned]
    line_break = prompts[0][-1]
    variants = ([line_break] * number + prompts[0] for number in range(100))
    compared_on = [prompt for prompt in variants if is_held_out(prompt_key(prompt), share)][:HELD_OUT_PROMPTS]

    def counters() -> ServerCounters:
        engine.read()
        return engine.state.counters

    def acceptance_length(name: str) -> float:
        """Return vLLM's own figure for one pass over the prompts."""
        before = counters()
        answers = engine_node.complete_all(prompts, 32, name, **WHOLE)
        assert answers == [output[:32] for output in outputs]
        after = counters()
        return 1 + (after.accepted_tokens - before.accepted_tokens) / (after.verify_steps - before.verify_steps)

    before = acceptance_length("untrained")
    with (
        worker(settings, tmp_path / "stream.log"),
        process(settings, RUN_TRAINER, tmp_path / "train.log"),
        process(settings, RUN_PROMOTER, tmp_path / "promoter.log"),
    ):
        deadline = time.monotonic() + TRAIN_TIMEOUT_S
        while (after := acceptance_length("loop")) < LEARNED:
            engine_node.complete_all(compared_on, 32, "compared")
            assert time.monotonic() < deadline, f"{after:.2f} after {TRAIN_TIMEOUT_S} s"
    assert before < 1.15
    status = engine_node.status
    print(f"from {before:.2f} to {after:.2f} with {[entry.version for entry in status.swaps]}")
    assert status.swaps
    assert status.registry_error is None
    assert status.rows_published > 0
    assert int(SpeculatorRegistry(settings.registry).aliases(line)["champion"]) >= int(status.swaps[-1].version)


def test_sigterm_ends_the_launcher_and_the_server(engine_node: VllmNode) -> None:
    launcher: Any = engine_node.process
    os.kill(launcher.pid, signal.SIGTERM)
    eventually(lambda: not launcher.alive, 40)
    assert launcher.exit_code == 0
    with pytest.raises(httpx.HTTPError):
        engine_node.client.get("/health")
