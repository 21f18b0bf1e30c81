"""Trace messages as nodes send them, from recorded requests: real tokens, states and teachers, under drawn drafts.

The recordings are short, and were decoded without drafts. Several answers make a long one, laid out again in verify
steps
whose drafted chain was accepted up to a drawn length: what was accepted are the answer's own tokens, what was not is
another token that the target held likely. Sizes, and how well they compress, are those of a node's traffic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from ops.bench import speculator
from ops.local.stack import Say
from schemas.errors import UserError
from schemas.settings import Settings
from schemas.telemetry.trace_context import of_request
from schemas.trace.decoder import decode
from schemas.trace.record import ROOT, Chunk, TraceError, VerifyStep, encode
from serving.engines.base import Request
from serving.traces.chunks import Assembly, Origin, Space, Way, cut
from serving.traces.producer import Headers, headers_of

DRAFTED = 3
"""Tokens of a drafted chain."""
ACCEPTED_SHARES = (0.35, 0.25, 0.2, 0.2)
"""How often none, one, two or all three of them were right: a trained draft's, about."""
ANSWERS = 8
"""Recorded answers that make one: enough for several of the largest messages."""
FEWEST = 24
"""Recorded requests that are enough: their messages repeat beyond them, under other request ids."""
_DOMAIN = "math"
_RECORDED_TOKENS = 96
_VERIFY_STEP_US = 50_000


@dataclass(frozen=True, slots=True)
class Message:
    """A record to publish."""

    key: bytes
    value: bytes
    headers: Headers
    verify_steps: int
    tokens: int


def recorded(settings: Settings, say: Say) -> list[Chunk]:
    """The recorded requests that `aurora bench speculator` left; a few are recorded now where there are none.

    Raises:
        UserError: no target to record from, or recordings that cannot be read.
    """
    folder = speculator.recordings(settings, _DOMAIN)
    files = sorted(folder.glob("*.trace"))
    if len(files) < FEWEST:
        speculator.record(settings, _DOMAIN, FEWEST, _RECORDED_TOKENS, say)
        files = sorted(folder.glob("*.trace"))
    try:
        return [decode(file.read_bytes()) for file in files]
    except TraceError as error:
        raise UserError(f"recordings in {folder}: {error}; remove the folder, and they are made anew") from error


def messages(requests: Sequence[Chunk], largest: int, size: int) -> list[Message]:
    """Messages of ``size`` bytes in all.

    Args:
        requests: Recorded, each whole.
        largest: Bytes that the full ones among them have, about: a node cuts by what a message takes uncompressed.
        size: Bytes of all messages.
    """
    rng = np.random.default_rng(0)
    first = list(_of_request(requests[:ANSWERS], 0, largest, rng))
    space = largest * largest // max(len(message.value) for message in first)
    made: list[Message] = []
    left = size
    for number in count():
        whole = [requests[(number * ANSWERS + i) % len(requests)] for i in range(ANSWERS)]
        for message in _of_request(whole, number, space, rng):
            made.append(message)
            left -= len(message.value)
        if left <= 0:
            return made
    raise AssertionError("count never ends")


def _of_request(whole: Sequence[Chunk], number: int, space: int, rng: np.random.Generator) -> Iterator[Message]:
    envelope = whole[0].envelope
    request = Request(id=f"bench-{number}", prompt=(), max_tokens=1, temperature=0.0, label=envelope.label)
    way = Way("inline", Space(space))
    assembly = Assembly(request, Origin("bench", envelope.target, envelope.line), way)
    prompt = [r for r in whole[0].verify_steps if r.verify_step == 0]
    verify_steps = drafted(prompt, [r for chunk in whole for r in chunk.verify_steps if r.verify_step > 0], rng)
    chunks = [assembly.add(part) for r in verify_steps for part in cut(r, way)]
    for chunk in [*chunks, assembly.end("length")]:
        if chunk is not None:
            yield Message(
                request.id.encode(),
                encode(chunk),
                headers_of(chunk, of_request(chunk.envelope.request)),
                len(chunk.verify_steps),
                sum(len(r.tokens) for r in chunk.verify_steps),
            )


def drafted(
    prompt: Sequence[VerifyStep], answer: Sequence[VerifyStep], rng: np.random.Generator
) -> Iterator[VerifyStep]:
    """One request with the prompt and the answer, as if a chain had been drafted in each verify step.

    Args:
        prompt: Its verify steps.
        answer: Verify steps of one token each; the positions follow the prompt.
        rng: Says how much was accepted.
    """
    yield from prompt[:-1]
    yield replace(prompt[-1], bonus=answer[0].tokens[0])
    at, position = 0, prompt[-1].position + len(prompt[-1].tokens)
    for number in count(1):
        taken = answer[at : at + 1 + int(rng.choice(len(ACCEPTED_SHARES), p=ACCEPTED_SHARES))]
        at += len(taken)
        if at >= len(answer):
            return
        accepted = len(taken) - 1
        missed = [int(token) for token in np.resize(taken[-1].top_ids[0, 1:], DRAFTED - accepted)]
        teachers = [*taken, *(answer[(at + i) % len(answer)] for i in range(len(missed)))]
        tokens = tuple(r.tokens[0] for r in taken)
        yield VerifyStep(
            verify_step=number,
            position=position,
            tokens=tokens,
            features=np.concatenate([r.features for r in taken]),
            draft_tokens=(*tokens[1:], *missed),
            draft_parents=tuple(range(ROOT, DRAFTED - 1)),
            draft_logprobs=tuple(float(x) for x in -rng.exponential(0.7, DRAFTED).astype(np.float32)),
            accepted=tuple(range(accepted)),
            bonus=answer[at].tokens[0],
            top_ids=np.concatenate([r.top_ids for r in teachers]),
            top_logprobs=np.concatenate([r.top_logprobs for r in teachers]),
            speculator="1",
            draft_us=_VERIFY_STEP_US // 5,
            verify_us=_VERIFY_STEP_US,
            time_us=prompt[0].time_us + number * _VERIFY_STEP_US,
        )
        position += len(tokens)
