"""Chunks hold every token of the verify steps once, in order, and stay within the size limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.trace.decoder import decode
from schemas.trace.record import Chunk, VerifyStep, encode
from serving.engines.base import Request
from serving.traces.chunks import (
    ChunkBuilder,
    ChunkSize,
    FeatureTransport,
    Origin,
    chunk_bytes,
    drop_features,
    row_bytes,
    split_prefill,
)

ORIGIN = Origin("node-a", "t" * 32, "line")
REQUEST = Request("chatcmpl-1", (1, 2), 5, temperature=0.5, top_k=7, seed=3, label="größe ✓")
F, K = 6, 2


def a_verify_step(number: int, position: int, tokens: int, drafted: int, rng: np.random.Generator) -> VerifyStep:
    draft = tuple(int(t) for t in rng.integers(0, 50_000, drafted))
    kept = min(tokens - 1, drafted)
    prompt = tuple(int(t) for t in rng.integers(0, 50_000, tokens))
    return VerifyStep(
        verify_step=number,
        position=position,
        tokens=prompt if number == 0 else (prompt[0], *draft[:kept]),
        features=rng.integers(0, 2**16, (tokens if number == 0 else 1 + kept, F)).astype(np.uint16),
        draft_tokens=draft,
        draft_parents=tuple(range(-1, drafted - 1)),
        draft_logprobs=tuple(np.float32(x).item() for x in -rng.random(drafted)),
        accepted=() if number == 0 else tuple(range(kept)),
        bonus=7,
        top_ids=rng.integers(0, 50_000, (1 + drafted, K)).astype(np.int32),
        top_logprobs=-rng.random((1 + drafted, K)).astype(np.float32),
        speculator="3" if drafted else "",
        draft_us=10,
        verify_us=20,
        time_us=1_700_000_000_000_000 + number,
    )


def a_request(prompt: int, answer: list[tuple[int, int]], seed: int = 0) -> list[VerifyStep]:
    rng = np.random.default_rng(seed)
    verify_steps, position = [a_verify_step(0, 0, prompt, 0, rng)], prompt
    for number, (kept, drafted) in enumerate(answer, start=1):
        verify_steps.append(a_verify_step(number, position, 1 + min(kept, drafted), drafted, rng))
        position += len(verify_steps[-1].tokens)
    return verify_steps


def inline(budget: int) -> FeatureTransport:
    return FeatureTransport("inline", ChunkSize(budget))


def assemble(verify_steps: list[VerifyStep], transport: FeatureTransport, request: Request = REQUEST) -> list[Chunk]:
    builder = ChunkBuilder(request, ORIGIN, transport)
    full = [builder.add(row) for r in verify_steps for row in split_prefill(r, transport)]
    return [chunk for chunk in [*full, builder.end("stop")] if chunk]


requests = st.builds(
    a_request,
    prompt=st.integers(1, 300),
    answer=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=20),
    seed=st.integers(0, 99),
)


@settings(deadline=None)
@given(verify_steps=requests, budget=st.integers(400, 6000))
def test_chunks_hold_every_token_once_in_order_and_below_the_budget(
    verify_steps: list[VerifyStep], budget: int
) -> None:
    chunks = assemble(verify_steps, inline(budget))
    rows = [row for chunk in chunks for row in chunk.verify_steps]
    assert [t for row in rows for t in row.tokens] == [t for r in verify_steps for t in r.tokens]
    assert np.array_equal(
        np.concatenate([r.features for r in rows]), np.concatenate([r.features for r in verify_steps])
    )
    assert [row.position for row in rows] == list(np.cumsum([0, *(len(row.tokens) for row in rows)])[:-1])
    assert sum(row.verify_us for row in rows) == sum(r.verify_us for r in verify_steps)
    assert [chunk.envelope.chunk for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.envelope.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(sum(map(row_bytes, chunk.verify_steps)) <= budget for chunk in chunks if len(chunk.verify_steps) > 1)


@settings(deadline=None)
@given(verify_steps=requests, budget=st.integers(400, 6000))
def test_a_chunk_survives_encoding_and_its_size_stays_below_the_bound(
    verify_steps: list[VerifyStep], budget: int
) -> None:
    for chunk in assemble(verify_steps, inline(budget)):
        value = encode(chunk)
        assert len(value) <= chunk_bytes(chunk)
        assert [r.tokens for r in decode(value).verify_steps] == [r.tokens for r in chunk.verify_steps]


def test_only_the_last_row_of_a_split_prompt_has_the_bonus_and_the_times() -> None:
    rows = split_prefill(a_request(100, [])[0], inline(600))
    assert len(rows) > 2
    assert all(row_bytes(row) <= 600 for row in rows)
    assert [row.bonus for row in rows] == [None] * (len(rows) - 1) + [7]
    assert [row.verify_us for row in rows] == [0] * (len(rows) - 1) + [20]


def test_a_verify_step_with_a_draft_is_never_split() -> None:
    verified = a_request(3, [(4, 4)])[1]
    assert split_prefill(verified, inline(1)) == (verified,)


def test_missing_verify_steps_end_the_chunk_and_skip_a_number() -> None:
    verify_steps = a_request(5, [(1, 2), (0, 2), (2, 2)])
    del verify_steps[2]
    chunks = assemble(verify_steps, inline(10**6))
    assert [(c.envelope.chunk, [r.verify_step for r in c.verify_steps]) for c in chunks] == [(0, [0, 1]), (2, [3])]


def test_a_request_without_its_first_verify_step_starts_at_chunk_one() -> None:
    assert [c.envelope.chunk for c in assemble(a_request(5, [(1, 2)])[1:], inline(10**6))] == [1]


def test_the_envelope_has_the_fields_of_the_request() -> None:
    (chunk,) = assemble(a_request(2, [(0, 1)]), inline(10**6))
    envelope = chunk.envelope
    assert (envelope.request, envelope.node, envelope.target, envelope.line) == (REQUEST.id, "node-a", "t" * 32, "line")
    assert (envelope.temperature, envelope.top_p, envelope.sampling_top_k) == (0.5, 1.0, 7)
    assert (envelope.seed, envelope.label) == (3, "größe ✓")
    assert (envelope.feature_width, envelope.top_k, envelope.finish) == (F, K, "stop")


def test_a_request_without_verify_steps_has_no_chunk() -> None:
    assert ChunkBuilder(REQUEST, ORIGIN, inline(100)).end("cancelled") is None


def test_a_chunk_before_the_end_has_no_finish() -> None:
    first, *_, last = assemble(a_request(200, []), inline(600))
    assert first.envelope == replace(last.envelope, chunk=0, last=False, finish=None)


@settings(deadline=None)
@given(verify_steps=requests, message=st.integers(400, 3000), file=st.integers(100, 3000))
def test_with_claim_checks_neither_message_nor_file_exceeds_its_limit(
    verify_steps: list[VerifyStep], message: int, file: int
) -> None:
    transport = FeatureTransport("claim-check", ChunkSize(message, file))
    chunks = assemble(verify_steps, transport)
    assert [t for c in chunks for row in c.verify_steps for t in row.tokens] == [
        t for r in verify_steps for t in r.tokens
    ]
    for chunk in chunks:
        if len(chunk.verify_steps) > 1:
            assert sum(row_bytes(r) - r.features.nbytes for r in chunk.verify_steps) <= message
            assert sum(r.features.nbytes for r in chunk.verify_steps) <= file


def tokens_before(verify_steps: list[VerifyStep], position: int) -> list[int]:
    return [t for r in verify_steps for t in r.tokens][:position]


def test_every_chunk_names_the_time_of_the_first_row_of_its_request() -> None:
    verify_steps = a_request(5, [(1, 2)] * 6)
    chunks = assemble(verify_steps, inline(500))
    assert len(chunks) > 1
    assert {chunk.envelope.start_us for chunk in chunks} == {verify_steps[0].time_us}
    without_start = assemble(verify_steps[1:], inline(500))
    assert {chunk.envelope.start_us for chunk in without_start} == {None}


@settings(deadline=None)
@given(verify_steps=requests, budget=st.integers(400, 12_000), missing=st.sets(st.integers(0, 20)))
def test_chunks_for_recompute_have_all_tokens_before_them_or_none(
    verify_steps: list[VerifyStep], budget: int, missing: set[int]
) -> None:
    transport = FeatureTransport("recompute", ChunkSize(budget))
    request = replace(REQUEST, prompt=verify_steps[0].tokens)
    bare = [drop_features(r) for r in verify_steps]
    lost_at = min((r.position for r in verify_steps if r.verify_step in missing - {0}), default=10**9)
    for chunk in assemble([r for r in bare if r.verify_step not in missing], transport, request):
        begin, before = chunk.verify_steps[0].position, list(chunk.envelope.preceding_tokens)
        assert len(encode(chunk)) <= chunk_bytes(chunk)
        assert before in ([], tokens_before(verify_steps, begin))
        if begin < lost_at and 22 * begin <= budget:
            assert before == tokens_before(verify_steps, begin)
        if begin > lost_at:
            assert before == []
        assert decode(encode(chunk)).envelope == chunk.envelope


def test_a_request_without_its_first_verify_step_has_the_prompt_before_it() -> None:
    verify_steps = [drop_features(r) for r in a_request(5, [(1, 2)])]
    request = replace(REQUEST, prompt=verify_steps[0].tokens)
    (chunk,) = assemble(verify_steps[1:], FeatureTransport("recompute", ChunkSize(10**6)), request)
    assert chunk.envelope.preceding_tokens == verify_steps[0].tokens
