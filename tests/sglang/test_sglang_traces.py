"""What the plugin records of SGLang's own server, beside what the built-in engine records of the same requests."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built_in import eos_of, verify_steps_of
from sglang_server import Server, eagle
from traced_chunks import chunks_of, every_chunk, rows_of, spoken, verify_steps_in

from schemas.settings import Settings
from schemas.speculator import checkpoint
from schemas.trace.record import VerifyStep, from_bf16

TOKENS = 36
WHOLE = {"ignore_eos": True}


@pytest.fixture(scope="module")
def server(serving: Any, trained_draft: Path, traced: Settings) -> Iterator[Server]:
    """Without a prefix cache, as the built-in engine: every prompt is read from its first token."""
    flags = [*eagle(trained_draft), "--disable-radix-cache", "--weight-version", "7"]
    with serving(flags, settings=traced) as running:
        yield running


def compare(a: VerifyStep, b: VerifyStep, *, drafts_too: bool = True) -> None:
    """SGLang's verify step beside the built-in engine's, which near its limit drafts only what still fits."""
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
    assert kept == len(a.draft_tokens) or not drafts_too
    np.testing.assert_array_equal(a.top_ids[: 1 + kept, :3], b.top_ids[:, :3])
    np.testing.assert_allclose(a.top_logprobs[: 1 + kept], b.top_logprobs, atol=2e-3)
    np.testing.assert_allclose(from_bf16(a.features), from_bf16(b.features), rtol=2e-2, atol=2e-2)
    assert bool(a.draft_tokens) == bool(a.speculator)


def test_traces_are_those_of_the_built_in_engine(
    server: Server,
    traced: Settings,
    smollm2: Path,
    trained_draft: Path,
    prompts: list[list[int]],
    said_by_target: list[list[int]],
) -> None:
    asked = {f"same-{number}": prompt for number, prompt in enumerate(prompts)}
    said = [server.generate(prompt, TOKENS, rid=name, sampling=WHOLE)["output_ids"] for name, prompt in asked.items()]
    assert said == [tokens[:TOKENS] for tokens in said_by_target]
    expected = verify_steps_of(smollm2, trained_draft, asked, TOKENS, steps=3)
    accepted = 0
    for name, prompt in asked.items():
        ours, theirs = verify_steps_in(chunks_of(traced.kafka, name)), expected[name]
        assert ours[0].tokens == tuple(prompt)
        assert spoken(ours) == spoken(theirs)
        for a, b in zip(ours, theirs, strict=True):
            compare(a, b, drafts_too=b.position + 5 < len(prompt) + TOKENS)
        accepted += sum(len(r.accepted) for r in ours)
    assert accepted > 20
    rows = rows_of(traced.kafka)
    assert rows["dead_letters"] == 0
    assert min(rows["accepted"], rows["rejected"], rows["traces"]) > 0


def test_requests_decoded_together_have_the_verify_steps_they_have_alone(
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


def test_a_chunk_says_which_target_line_and_version_it_comes_from(
    server: Server, traced: Settings, smollm2: Path, trained_draft: Path, prompts: list[list[int]]
) -> None:
    server.generate(prompts[0], 8, rid="named", sampling=WHOLE | {"temperature": 0.5, "top_k": 20})
    (chunk,) = chunks_of(traced.kafka, "named")
    envelope, line = chunk.envelope, checkpoint.read_manifest(trained_draft).line
    assert (envelope.target, envelope.line) == (checkpoint.target_fingerprint(smollm2), line)
    assert (envelope.node, envelope.finish, envelope.temperature) == ("sglang-0", "length", 0.5)
    assert (envelope.sampling_top_k, envelope.vocabulary) == (20, 49152)
    assert {r.speculator for r in chunk.verify_steps if r.verify_step} == {"7"}
    assert all(r.verify_us > 0 for r in chunk.verify_steps)
    assert all(r.draft_us > 0 for r in chunk.verify_steps if r.verify_step)


def test_a_trace_ends_where_the_answer_does_though_more_was_accepted(
    server: Server, traced: Settings, smollm2: Path, prompts: list[list[int]]
) -> None:
    answer = server.generate(prompts[1], TOKENS, rid="stopped")
    (chunk,) = chunks_of(traced.kafka, "stopped")
    assert answer["meta_info"]["finish_reason"]["type"] == chunk.envelope.finish == "stop"
    assert spoken(chunk.verify_steps) == [*prompts[1], *answer["output_ids"]]
    assert chunk.verify_steps[-1].bonus == eos_of(smollm2)
