"""Kafka records and table rows of synthetic requests, in the format of nodes and the stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from bfloat16 import to_bf16

from pipeline.batches import Record, build
from schemas.trace.record import CONTENT_TYPE, SCHEMA_ID, Chunk, Envelope, Features, VerifyStep, encode
from serving.traces.chunks import drop_features

WIDTH, TOP_K = 24, 3
TARGET, LINE = "t" * 32, "target-draft"


def verify_step_of(
    number: int,
    position: int,
    tokens: Sequence[int],
    bonus: int,
    draft: Sequence[int] = (),
    *,
    features: np.ndarray | None = None,
    said: np.ndarray | None = None,
    logprob: float = -0.5,
) -> VerifyStep:
    """Return a verify step with a drafted chain, accepted as far as ``tokens`` match it."""
    verified = 1 + len(draft)
    if features is None:
        features = np.repeat(np.arange(position, position + len(tokens))[:, None], WIDTH, axis=1) / 8
    if said is None:
        said = (np.arange(verified)[:, None] + np.arange(TOP_K)[None] * 7 + position) % 20
    return VerifyStep(
        verify_step=number,
        position=position,
        tokens=tuple(tokens),
        features=to_bf16(features.astype(np.float32)),
        draft_tokens=tuple(draft),
        draft_parents=tuple(range(-1, len(draft) - 1)),
        draft_logprobs=(logprob,) * len(draft),
        accepted=tuple(range(len(tokens) - 1)) if number else (),
        bonus=bonus,
        top_ids=said.astype(np.int32),
        top_logprobs=np.tile(np.log(np.array([0.6, 0.3, 0.05], np.float32)), (verified, 1))[:, : said.shape[1]],
        speculator="1",
        draft_us=1,
        verify_us=1,
        time_us=1_700_000_000_000_000,
    )


def conversation(tokens: Sequence[int], prompt: int, *, wrong: int = 19) -> list[VerifyStep]:
    """Return the verify steps of a request; every draft has one right and one wrong token."""
    verify_steps = [verify_step_of(0, 0, tokens[:prompt], tokens[prompt])]
    at = prompt
    while at + 2 < len(tokens):
        verify_steps.append(
            verify_step_of(len(verify_steps), at, tokens[at : at + 2], tokens[at + 2], [tokens[at + 1], wrong])
        )
        at += 2
    return verify_steps


def record_of(  # noqa: PLR0913 - one for each thing that a test may vary
    request: str,
    verify_steps: Sequence[VerifyStep],
    offset: int,
    *,
    partition: int = 0,
    chunk: int = 0,
    target: str = TARGET,
    line: str = LINE,
    feature_width: int = WIDTH,
    top_k: int = TOP_K,
    features: Features = "inline",
    before: Sequence[int] = (),
    last: bool = True,
    finish: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    sampling_top_k: int = 0,
    prompt_key: str | None = None,
) -> Record:
    """Return the record with the verify steps; their features only inline."""
    if features != "inline":
        verify_steps = [drop_features(r) for r in verify_steps]
    envelope = Envelope(
        request=request,
        chunk=chunk,
        last=last,
        node="node-0",
        target=target,
        line=line,
        features=features,
        preceding_tokens=tuple(before),
        feature_width=feature_width,
        top_k=top_k,
        temperature=temperature,
        top_p=top_p,
        sampling_top_k=sampling_top_k,
        finish=finish,
        prompt_key=prompt_key,
    )
    headers = {"content-type": CONTENT_TYPE, "schema": SCHEMA_ID, "rows": str(len(verify_steps))}
    value = encode(Chunk(envelope, tuple(verify_steps)))
    as_bytes = tuple((name, text.encode()) for name, text in headers.items())
    return Record("traces", partition, offset, 1_700_000_000_000_000, request.encode(), value, as_bytes)


def tables_of(*records: Record) -> dict[str, pa.Table]:
    """Return the rows of every table; a dead letter is an error."""
    built = build(records, 32)
    assert not built.dead_letters, built.rows["dead_letters"].to_pylist()
    return dict(built.rows)
