"""Trace messages as nodes send them, from recorded requests: real tokens, states and teachers, and simulated drafts.

The recordings are short and were decoded without drafts. Several outputs are joined into a long one and cut into verify
steps again, each with a drafted chain that is accepted up to a drawn length: the accepted tokens are the output's own,
each rejected one is another token that the target gave a high probability. Sizes and compression ratios are those of a
node's traffic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from ops.bench import recording
from ops.bench.harness import Say
from schemas.errors import UserError
from schemas.settings import Settings
from schemas.telemetry.trace_context import request_context
from schemas.trace.decoder import decode
from schemas.trace.record import ROOT, Chunk, TraceError, VerifyStep, encode
from serving.engines.base import Request
from serving.traces.chunks import (
    ChunkBuilder,
    ChunkSize,
    FeatureTransport,
    Headers,
    Origin,
    message_headers,
    split_prefill,
)

DRAFT_TOKENS = 3
"""Length of a drafted chain."""
ACCEPTED_SHARES = (0.35, 0.25, 0.2, 0.2)
"""Probability of 0, 1, 2 and 3 accepted tokens, about that of a trained draft."""
OUTPUTS_JOINED = 8
"""Recorded outputs in one request: enough for several of the largest messages."""
MIN_RECORDED = 24
"""Recorded requests that are enough: beyond them messages repeat under other request ids."""
_DOMAIN = "math"
_RECORDED_TOKENS = 96
_VERIFY_STEP_US = 50_000


@dataclass(frozen=True, slots=True)
class TraceMessage:
    """A record to publish."""

    key: bytes
    value: bytes
    headers: Headers
    verify_steps: int
    tokens: int


def read_recorded(settings: Settings, say: Say) -> list[Chunk]:
    """Read the requests that `aurora bench speculator` recorded; record a few where there are too few."""
    folder = recording.recordings_folder(settings, _DOMAIN)
    if len(list(folder.glob("*.trace"))) < MIN_RECORDED:
        recording.record_domain(settings, _DOMAIN, MIN_RECORDED, _RECORDED_TOKENS, say)
    try:
        return [decode(file.read_bytes()) for file in sorted(folder.glob("*.trace"))]
    except TraceError as error:
        raise UserError(f"recordings in {folder}: {error}; remove the folder to record again") from error


def build_messages(requests: Sequence[Chunk], largest: int, size: int) -> list[TraceMessage]:
    """Build messages of ``size`` bytes in total.

    Args:
        requests: Recorded requests, each whole.
        largest: Approximate bytes of a full message; a node cuts by the uncompressed size.
        size: Bytes of all messages.
    """
    rng = np.random.default_rng(0)
    first = list(_request_messages(requests[:OUTPUTS_JOINED], 0, largest, rng))
    space = largest * largest // max(len(message.value) for message in first)
    messages: list[TraceMessage] = []
    left = size
    for number in count():
        joined = [requests[(number * OUTPUTS_JOINED + i) % len(requests)] for i in range(OUTPUTS_JOINED)]
        for message in _request_messages(joined, number, space, rng):
            messages.append(message)
            left -= len(message.value)
        if left <= 0:
            return messages
    raise AssertionError("count never ends")


def _request_messages(
    joined: Sequence[Chunk], number: int, space: int, rng: np.random.Generator
) -> Iterator[TraceMessage]:
    envelope = joined[0].envelope
    request = Request(id=f"bench-{number}", prompt=(), max_tokens=1, temperature=0.0, label=envelope.label)
    way = FeatureTransport("inline", ChunkSize(space))
    builder = ChunkBuilder(request, Origin("bench", envelope.target, envelope.line), way)
    prompt = [step for step in joined[0].verify_steps if step.verify_step == 0]
    output = [step for chunk in joined for step in chunk.verify_steps if step.verify_step > 0]
    steps = simulate_drafts(prompt, output, rng)
    chunks = [builder.add(part) for step in steps for part in split_prefill(step, way)]
    for chunk in [*chunks, builder.end("length")]:
        if chunk is not None:
            yield TraceMessage(
                request.id.encode(),
                encode(chunk),
                message_headers(chunk, request_context(chunk.envelope.request)),
                len(chunk.verify_steps),
                sum(len(step.tokens) for step in chunk.verify_steps),
            )


def simulate_drafts(
    prompt: Sequence[VerifyStep], output: Sequence[VerifyStep], rng: np.random.Generator
) -> Iterator[VerifyStep]:
    """Yield one request with the prompt and the output, as if every verify step had drafted a chain.

    Args:
        prompt: Verify steps of the prompt.
        output: Verify steps of one token each; the positions follow the prompt.
        rng: Draws the number of accepted tokens.
    """
    yield from prompt[:-1]
    yield replace(prompt[-1], bonus=output[0].tokens[0])
    at, position = 0, prompt[-1].position + len(prompt[-1].tokens)
    for number in count(1):
        committed = output[at : at + 1 + int(rng.choice(len(ACCEPTED_SHARES), p=ACCEPTED_SHARES))]
        at += len(committed)
        if at >= len(output):
            return
        accepted = len(committed) - 1
        rejected = [int(token) for token in np.resize(committed[-1].top_ids[0, 1:], DRAFT_TOKENS - accepted)]
        teachers = [*committed, *(output[(at + i) % len(output)] for i in range(len(rejected)))]
        tokens = tuple(step.tokens[0] for step in committed)
        yield VerifyStep(
            verify_step=number,
            position=position,
            tokens=tokens,
            features=np.concatenate([step.features for step in committed]),
            draft_tokens=(*tokens[1:], *rejected),
            draft_parents=tuple(range(ROOT, DRAFT_TOKENS - 1)),
            draft_logprobs=tuple(float(x) for x in -rng.exponential(0.7, DRAFT_TOKENS).astype(np.float32)),
            accepted=tuple(range(accepted)),
            bonus=output[at].tokens[0],
            top_ids=np.concatenate([step.top_ids for step in teachers]),
            top_logprobs=np.concatenate([step.top_logprobs for step in teachers]),
            speculator="1",
            draft_us=_VERIFY_STEP_US // 5,
            verify_us=_VERIFY_STEP_US,
            time_us=prompt[0].time_us + number * _VERIFY_STEP_US,
        )
        position += len(tokens)
