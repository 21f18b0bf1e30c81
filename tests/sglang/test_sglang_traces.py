"""Traces of SGLang's own server, compared with those of the built-in engine for the same requests."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bfloat16 import from_bf16
from built_in import eos_of, verify_steps_of
from sglang_server import Server, eagle
from traced_chunks import all_tokens, chunks_of, every_chunk, rows_of, verify_steps_in

from schemas.settings import Settings
from schemas.speculator import checkpoint
from schemas.speculator.target_fingerprint import target_fingerprint
from schemas.trace.record import VerifyStep

TOKENS = 36
WHOLE = {"ignore_eos": True}


@pytest.fixture(scope="module")
def server(serving: Any, trained_draft: Path, traced: Settings) -> Iterator[Server]:
    """A server without a prefix cache, as the built-in engine: it prefills every prompt from its first token."""
    flags = [*eagle(trained_draft), "--disable-radix-cache", "--weight-version", "7"]
    with serving(flags, settings=traced) as running:
        yield running


def compare(a: VerifyStep, b: VerifyStep, *, same_drafts: bool = True) -> None:
    """Compare verify steps of SGLang and of the built-in engine, which drafts less near the length limit."""
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


def test_traces_are_those_of_the_built_in_engine(
    server: Server,
    traced: Settings,
    smollm2: Path,
    trained_draft: Path,
    prompts: list[list[int]],
    target_outputs: list[list[int]],
) -> None:
    requests = {f"same-{number}": prompt for number, prompt in enumerate(prompts)}
    outputs = [
        server.generate(prompt, TOKENS, rid=name, sampling=WHOLE)["output_ids"] for name, prompt in requests.items()
    ]
    assert outputs == [tokens[:TOKENS] for tokens in target_outputs]
    expected = verify_steps_of(smollm2, trained_draft, requests, TOKENS, steps=3)
    accepted = 0
    for name, prompt in requests.items():
        ours, theirs = verify_steps_in(chunks_of(traced.kafka, name)), expected[name]
        assert ours[0].tokens == tuple(prompt)
        assert all_tokens(ours) == all_tokens(theirs)
        for a, b in zip(ours, theirs, strict=True):
            compare(a, b, same_drafts=b.position + 5 < len(prompt) + TOKENS)
        accepted += sum(len(r.accepted) for r in ours)
    assert accepted > 20
    rows = rows_of(traced.kafka)
    assert rows["dead_letters"] == 0
    assert min(rows["accepted"], rows["rejected"], rows["traces"]) > 0


def test_concurrent_requests_have_the_same_verify_steps_as_sequential_ones(
    server: Server, traced: Settings, prompts: list[list[int]]
) -> None:
    def ask(number: int) -> Any:
        options = (
            {"custom_params": {"aurora_trace": "off"}} if number == 1 else {"custom_params": {"aurora_label": "x"}}
        )
        return server.generate(prompts[number], TOKENS, rid=f"beside-{number}", sampling=WHOLE | options)

    for number in (0, 2):
        server.generate(prompts[number], TOKENS, rid=f"alone-{number}", sampling=WHOLE)
    with ThreadPoolExecutor() as pool:
        list(pool.map(ask, range(3)))
    for number in (0, 2):
        chunks = chunks_of(traced.kafka, f"beside-{number}")
        assert {chunk.envelope.label for chunk in chunks} == {"x"}
        alone = verify_steps_in(chunks_of(traced.kafka, f"alone-{number}"))
        for a, b in zip(verify_steps_in(chunks), alone, strict=True):
            compare(a, b)
    assert not [chunk for chunk in every_chunk(traced.kafka) if chunk.envelope.request == "beside-1"]


def test_a_chunk_names_its_target_line_and_version(
    server: Server, traced: Settings, smollm2: Path, trained_draft: Path, prompts: list[list[int]]
) -> None:
    server.generate(prompts[0], 8, rid="named", sampling=WHOLE | {"temperature": 0.5, "top_k": 20})
    (chunk,) = chunks_of(traced.kafka, "named")
    envelope, line = chunk.envelope, checkpoint.read_manifest(trained_draft).line
    assert (envelope.target, envelope.line) == (target_fingerprint(smollm2), line)
    assert (envelope.node, envelope.finish, envelope.temperature) == ("sglang-0", "length", 0.5)
    assert (envelope.sampling_top_k, envelope.vocab_size) == (20, 49152)
    assert {r.speculator for r in chunk.verify_steps if r.verify_step} == {"7"}
    assert all(r.verify_us > 0 for r in chunk.verify_steps)
    assert all(r.draft_us > 0 for r in chunk.verify_steps if r.verify_step)


def test_a_trace_ends_with_the_answer_although_more_tokens_were_accepted(
    server: Server, traced: Settings, smollm2: Path, prompts: list[list[int]]
) -> None:
    answer = server.generate(prompts[1], TOKENS, rid="stopped")
    (chunk,) = chunks_of(traced.kafka, "stopped")
    assert answer["meta_info"]["finish_reason"]["type"] == chunk.envelope.finish == "stop"
    assert all_tokens(chunk.verify_steps) == [*prompts[1], *answer["output_ids"]]
    assert chunk.verify_steps[-1].bonus == eos_of(smollm2)
