"""Chunks: builds the Kafka messages of a request from its verify steps, within the size limits. No I/O."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from schemas.hash_sampling import prompt_key
from schemas.telemetry import trace_context
from schemas.telemetry.spans import Span
from schemas.telemetry.trace_context import TraceContext, request_context
from schemas.trace.record import CONTENT_TYPE, FORMAT, SCHEMA_ID, Chunk, Envelope, Features, VerifyStep
from serving.engines.base import Finish, Request

FRAME_BYTES = 8192
"""Upper bound of a chunk's size without its rows: Arrow metadata, buffer padding, envelope, key and headers."""

_ROW_BYTES = 160
_TOKEN_BEFORE_BYTES = 11
"""Upper bound of the size of a token in ``Envelope.before``."""

Headers = list[tuple[str, str | bytes | None]]


@dataclass(frozen=True, slots=True)
class Origin:
    """Origin of the verify steps; the same for every chunk of a node."""

    node: str
    target: str
    line: str
    vocabulary: int | None = None
    """Size of the target's vocabulary; None where it is not known."""


@dataclass(frozen=True, slots=True)
class ChunkSize:
    """Bytes of a message, and of the file with its offloaded features."""

    message: int
    file: int = 0

    def __add__(self, other: ChunkSize) -> ChunkSize:
        return ChunkSize(self.message + other.message, self.file + other.file)

    def fits(self, limit: ChunkSize) -> bool:
        """Return whether both parts are within the limit."""
        return self.message <= limit.message and self.file <= limit.file


@dataclass(frozen=True, slots=True)
class FeatureTransport:
    """How features travel (``traces.features``), and the size limit of a chunk's rows."""

    features: Features
    limit: ChunkSize

    def row_size(self, step: VerifyStep) -> ChunkSize:
        """Return the size of a row."""
        if self.features != "claim-check":
            return ChunkSize(row_bytes(step))
        return ChunkSize(row_bytes(step) - step.features.nbytes, step.features.nbytes)


def row_bytes(step: VerifyStep) -> int:
    """Return an upper bound of a row's size in an encoded chunk, as if nothing in it could be compressed."""
    ids = 4 * len(step.tokens) + 11 * len(step.draft_tokens) + 2 * len(step.accepted)
    numbers = step.features.nbytes + step.top_ids.nbytes + step.top_logprobs.nbytes
    return numbers + ids + len(step.speculator.encode()) + _ROW_BYTES


def chunk_bytes(chunk: Chunk) -> int:
    """Return an upper bound of a chunk's size, the file of its features included."""
    return (
        FRAME_BYTES
        + sum(map(row_bytes, chunk.verify_steps))
        + _TOKEN_BEFORE_BYTES * len(chunk.envelope.preceding_tokens)
    )


def message_headers(chunk: Chunk, context: TraceContext) -> Headers:
    """Return the headers of a chunk, readable before it is decoded; ``context`` is the span that publishes it."""
    versions = [step.speculator for step in chunk.verify_steps if step.speculator]
    fields = {
        "content-type": CONTENT_TYPE,
        "format": FORMAT,
        "schema": SCHEMA_ID,
        "node": chunk.envelope.node,
        "target": chunk.envelope.target,
        "speculator": versions[-1] if versions else "",
        "rows": str(len(chunk.verify_steps)),
        trace_context.TRACEPARENT: context.to_traceparent(),
    }
    if chunk.envelope.claim:
        fields["claim-bytes"] = str(chunk.envelope.claim.size)
    return [(name, text.encode()) for name, text in fields.items()]


def message_bytes(value: bytes, key: bytes, headers: Headers) -> int:
    """Return the size of a message."""
    return len(value) + len(key) + sum(len(name) + len(text or "") for name, text in headers)


def drop_features(step: VerifyStep) -> VerifyStep:
    """Return the verify step without its features, so that their memory can be freed."""
    return replace(step, features=np.empty((0, step.features.shape[1]), np.uint16)) if len(step.features) else step


def strip_features(chunk: Chunk) -> Chunk:
    """Return the chunk without features, and without the tokens that the trainer would recompute them from."""
    envelope = replace(chunk.envelope, features="dropped", preceding_tokens=())
    return Chunk(envelope, tuple(map(drop_features, chunk.verify_steps)))


def split_prefill(step: VerifyStep, transport: FeatureTransport) -> tuple[VerifyStep, ...]:
    """Split a prefill into rows that fit into a chunk, as far as tokens can be separated; only the last has a bonus.

    A row with a draft is one decision of the verifier and stays whole. Only the last row carries the times, so that
    their sum is right.
    """
    if transport.row_size(step).fits(transport.limit) or step.draft_tokens:
        return (step,)
    n = len(step.tokens)
    fixed, whole = transport.row_size(_part(step, 0, 0, is_end=True)), transport.row_size(step)
    lengths = [
        (limit - least) * n // (most - least)
        for limit, least, most in (
            (transport.limit.message, fixed.message, whole.message),
            (transport.limit.file, fixed.file, whole.file),
        )
        if most > least
    ]
    length = max(1, min(lengths))
    return tuple(_part(step, at, min(at + length, n), is_end=at + length >= n) for at in range(0, n, length))


def _part(step: VerifyStep, start: int, end: int, *, is_end: bool) -> VerifyStep:
    part = replace(
        step, position=step.position + start, tokens=step.tokens[start:end], features=step.features[start:end]
    )
    if is_end:
        return part
    return replace(
        part, bonus=None, top_ids=step.top_ids[:0], top_logprobs=step.top_logprobs[:0], draft_us=0, verify_us=0
    )


class ChunkBuilder:
    """Builds the chunks of one request.

    A chunk holds consecutive verify steps. Where steps are missing (they were dropped), the chunk ends and one chunk
    number is skipped, so that a reader sees the gap. The newest steps stay here until the next ones, or the end of the
    request, arrive: the last chunk of a request is never empty.
    """

    def __init__(self, request: Request, origin: Origin, transport: FeatureTransport) -> None:
        self._request = request
        self._prompt_key = request.prompt_key or prompt_key(request.prompt)
        self._origin = origin
        self._transport = transport
        self._verify_steps: list[VerifyStep] = []
        self._size = ChunkSize(0)
        self._number = 0
        self._position = 0
        self._known: list[int] | None = [] if transport.features == "recompute" else None
        """Tokens up to ``_position``; None once an answer token was missed."""
        self._before: tuple[int, ...] = ()
        self._start_us: int | None = None

    def add(self, step: VerifyStep) -> Chunk | None:
        """Add the next verify step; return the chunk that ends before it, if one does."""
        is_gap, size = step.position != self._position, self._transport.row_size(step)
        full = self.end(None) if is_gap or not (self._size + size).fits(self._transport.limit) else None
        self._number += is_gap
        if is_gap and self._known is not None:
            # The prompt's tokens are known. Those of the answer were in the missing verify steps.
            prompt = self._request.prompt
            self._known = list(prompt[: step.position]) if step.position <= len(prompt) else None
        if step.position == 0:
            self._start_us = step.time_us
        if not self._verify_steps:
            self._start_chunk()
        self._verify_steps.append(step)
        self._size += size
        self._position = step.position + len(step.tokens)
        if self._known is not None:
            self._known += step.tokens
        return full

    def end(self, finish: Finish | None) -> Chunk | None:
        """Return the remaining verify steps as a chunk, the last one of the request if ``finish`` is given."""
        if not self._verify_steps:
            return None
        chunk = Chunk(self._envelope(finish), tuple(self._verify_steps))
        self._verify_steps.clear()
        self._size = ChunkSize(0)
        self._number += 1
        return chunk

    def _start_chunk(self) -> None:
        """Reserve space for the tokens before the chunk; leave them out where they would take most of it."""
        before = tuple(self._known or ())
        size = ChunkSize(_TOKEN_BEFORE_BYTES * len(before))
        is_small = 2 * size.message <= self._transport.limit.message
        self._before, self._size = (before, size) if is_small else ((), ChunkSize(0))

    def _envelope(self, finish: Finish | None) -> Envelope:
        first, request = self._verify_steps[0], self._request
        return Envelope(
            request=request.id,
            chunk=self._number,
            last=finish is not None,
            node=self._origin.node,
            target=self._origin.target,
            line=self._origin.line,
            features=self._transport.features,
            feature_width=first.features.shape[1],
            top_k=first.top_ids.shape[1],
            temperature=request.temperature,
            top_p=request.top_p,
            sampling_top_k=request.top_k,
            seed=request.seed,
            label=request.label,
            finish=finish,
            preceding_tokens=self._before,
            vocab_size=self._origin.vocabulary,
            start_us=self._start_us,
            prompt_key=self._prompt_key,
        )


@dataclass(frozen=True, slots=True)
class Delivery:
    """A chunk on its way to the broker: its share of the accounting, and its span."""

    rows: int
    size: int
    context: TraceContext
    request: str
    number: int
    start: float
    """Unix time."""

    @classmethod
    def create(cls, chunk: Chunk) -> Delivery:
        """Start the delivery of a chunk."""
        request, size = chunk.envelope.request, sum(map(row_bytes, chunk.verify_steps))
        context = request_context(request).child()
        return cls(len(chunk.verify_steps), size, context, request, chunk.envelope.chunk, time.time())

    def span(self, topic: str, error_type: str | None) -> Span:
        """Return the span of a delivery that the broker has just acknowledged, or that failed."""
        return Span(
            name=f"send {topic}",
            event="chunk_published" if error_type is None else "chunk_dropped",
            context=self.context,
            start=self.start,
            end=time.time(),
            parent=request_context(self.request).span_id,
            kind="producer",
            error_type=error_type,
            attributes={
                "messaging.system": "kafka",
                "messaging.operation.name": "send",
                "messaging.operation.type": "send",
                "messaging.destination.name": topic,
                "messaging.kafka.message.key": self.request,
                "messaging.message.body.size": self.size,
                "request": self.request,
                "chunk": self.number,
                "rows": self.rows,
            },
        )
